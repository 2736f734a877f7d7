"""Every fault that stops prfl, planted for real: the message says what is wrong, where, and how to mend it, in one
error without a traceback, and nothing half done is left behind.

``python -m tests.test_faults`` prints the table of faults and messages as markdown.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from prfl import cli, draws
from prfl.backbone import WanBackbone, adapters, load_backbone
from prfl.config.schema import TrainingConfig
from prfl.data.dataset import load_dataset
from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import write_video
from prfl.errors import PrflError
from prfl.flow import chain_sigmas
from prfl.objective.prfl import Prfl
from prfl.objective.sft import Sft
from prfl.reward import LatentReward, RewardHead
from prfl.reward.files import RewardCard
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.solvers import euler
from prfl.training import RunFolder, guards, make_accelerator, train
from tests.conftest import TEXT_WIDTH, save_tiny_pipeline
from tests.objective.parts import pixel_objective, with_policy
from tests.objective.test_sft import dataset

CLIP = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}
PROMPTS = {"train": ["a red circle", "a blue square"], "validation": ["a green circle"], "test": ["a red square"]}


# ---------------------------------------------------------------------------------------------------- a small project


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """Clips, prompts, configs, two saved rewards and an SFT run with two checkpoints; copied for every fault."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_project(tiny_pipeline_folder)
        assert cli.main(["train", "sft.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


def make_project(model: Path) -> None:
    for split, prompts in PROMPTS.items():
        Path(f"{split}.txt").write_text("\n".join(prompts) + "\n")
    rows = []
    for index in range(4):
        path = Path(f"clips/{index}.mp4")
        noise = draws.normal((3, 5, 16, 16), 0, "clip", 0, [index])[0]
        write_video(path, (0.3 * noise + (0.5 if index % 2 else -0.5)).clamp(-1, 1), 8)
        label = {"light": float(index % 2), "calm": float(index < 2)}
        rows.append(LabelledVideo(path, PROMPTS["train"][index // 2], label))
    write_manifest("manifest.jsonl", rows)
    clips = {"manifest": "manifest.jsonl"}
    common: dict[str, Any] = {"version": 1, "seed": 0, "rollout": {"steps": 4}, "evaluation": {"every": 0}}
    data = {"cache": "cache", **CLIP, "prompts": {split: f"{split}.txt" for split in PROMPTS}}
    training = {"steps": 2, "batch": 2, "learning_rate": 1e-3, "save_every": 1, "trackers": []}
    policy = {"model": str(model), "adapter": {"rank": 2, "alpha": 2}}
    head = {"dimensions": ["light", "calm"], "blocks": [1], "inner": 8, "hidden": 8}
    steer = {"weights": {"light": 1.0}, "shape": "linear"}
    configs: dict[str, dict[str, Any]] = {
        "sft": {"backbone": policy, "data": {**data, **clips}, "objective": {"name": "sft"}},
        "reward": {
            "backbone": {"model": str(model)},
            "data": {**data, **clips},
            "reward": {"space": "latent", "head": head},
            "objective": {"name": "preference", "loss": "bce"},
        },
        "prfl": {
            "backbone": policy,
            "data": data,
            "reward": {"space": "latent", "path": "heads/latent", **steer},
            "objective": {"name": "prfl"},
        },
        "vader": {
            "backbone": policy,
            "data": data,
            "reward": {"space": "pixel", "path": "heads/pixel", **steer},
            "objective": {"name": "vader"},
        },
    }
    for name, own in configs.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**common, "training": training, "run": f"runs/{name}", **own}))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": ["reward.yaml", "prfl.yaml"]}))
    card = RewardCard(**{name: (value, value) for name, value in CLIP.items()})
    torch.manual_seed(0)
    latent = RewardHead(24, ["light", "calm"], inner=8, hidden=8)
    LatentReward(latent, load_backbone(model), [1], card=card).save_pretrained("heads/latent")
    PixelReward(PixelNetwork(TEXT_WIDTH, ["light", "calm"], hidden=8, inner=8), card=card).save_pretrained(
        "heads/pixel"
    )


@dataclass
class Bench:
    """What a fault is planted in, and how it is then run into."""

    patch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture
    model: Path
    folder: Path
    changed: set[str] = field(default_factory=set)  # files that are there, gone or other after the refusal

    def cli(self, *arguments: str) -> str:
        """The message of a command that is refused."""
        return self.watched(lambda: self.fails(arguments))

    def fails(self, arguments: tuple[str, ...]) -> str:
        self.capsys.readouterr()
        assert cli.main(arguments) == 2
        return self.capsys.readouterr().err.rpartition("prfl: ")[2].strip()  # behind the libraries' own bars

    def call(self, function: Callable, *args: Any, **named: Any) -> str:
        """The message of a public function that refuses."""

        def refused() -> str:
            with pytest.raises(PrflError) as caught:
                function(*args, **named)
            return str(caught.value)

        return self.watched(refused)

    def watched(self, run: Callable[[], str]) -> str:
        before = self.files()
        message = run()
        after = self.files()
        self.changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        return message

    def files(self) -> dict[str, str]:
        """Every file with its hash; the cache's own are whole or absent by construction, only half ones count."""
        found = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_file() or p.is_symlink()}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in found.items()
            if not name.startswith("cache/") or "tmp" in name
        }

    def rows(self, change: Callable[[list[dict]], None]) -> None:
        """Rewrite the manifest."""
        rows = [json.loads(line) for line in Path("manifest.jsonl").read_text().splitlines()]
        change(rows)
        Path("manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def other_model(self, name: str = "other", **changes: Any) -> str:
        return f"backbone.model={save_tiny_pipeline(self.folder / name, seed=1, **changes)}"

    def copied_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "model"))


@pytest.fixture
def bench(template, tmp_path, tiny_pipeline_folder, monkeypatch, capsys) -> Bench:
    folder = Path(shutil.copytree(template, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return Bench(monkeypatch, capsys, tiny_pipeline_folder, folder)


@dataclass(frozen=True)
class Fault:
    name: str
    parts: tuple[str, ...]  # of the message: what, where, how to mend it
    leaves: tuple[str, ...]  # the only places in which files may have changed
    plant: Callable[[Bench], str]


FAULTS: list[Fault] = []


def fault(name: str, *parts: str, leaves: tuple[str, ...] = ()) -> Callable:
    def register(plant: Callable[[Bench], str]) -> None:
        FAULTS.append(Fault(name, parts, leaves, plant))

    return register


@pytest.mark.parametrize("planted", FAULTS, ids=lambda planted: planted.name)
def test_fault(planted: Fault, bench: Bench, record_property: Callable) -> None:
    message = planted.plant(bench)
    record_property("fault", planted.name)
    record_property("message", message.replace(str(bench.folder), ".").replace(str(bench.model), "MODEL"))
    for part in planted.parts:
        assert part in message, message
    assert "Traceback" not in message and message.count("\n") <= 3, message
    strange = {name for name in bench.changed if not name.startswith(planted.leaves or ("nothing",))}
    assert not strange, f"files that were changed or left: {sorted(strange)}"
    assert not [name for name in bench.files() if ".tmp" in name or ".old" in name]


def test_there_are_enough_of_them() -> None:
    names = [planted.name for planted in FAULTS]
    assert len(names) == len(set(names)) >= 30


# ------------------------------------------------------------------------------------------------------- the config


@fault("a misspelt key", "sft.yaml: training.stepz: unknown key", "Did you mean 'steps'")
def _(bench):
    text = Path("sft.yaml").read_text().replace("  steps: 2", "  stepz: 2")
    Path("sft.yaml").write_text(text)
    return bench.cli("train", "sft.yaml")


@fault("a key of another method", "objective.handoff", "it belongs to name: prfl")
def _(bench):
    return bench.cli("train", "sft.yaml", "objective.handoff=clean")


@fault("a key that nobody reads in this combination", "reward.head.queries", "pooling mean does not read it")
def _(bench):
    return bench.cli("train", "reward.yaml", "reward.head.pooling=mean", "reward.head.queries=3")


@fault("samples asked for where no video is drawn", "evaluation.final_samples", "does not read it")
def _(bench):
    return bench.cli("train", "reward.yaml", "evaluation.final_samples=4")


@fault("kernels that do not exist", "backbone.kernels", "cannot run", "To mend it: kernels: auto")
def _(bench):
    return bench.cli("train", "sft.yaml", "backbone.kernels=triton")


@fault("a yaml bomb", "bomb.yaml:1: anchors and aliases are not read")
def _(bench):
    Path("bomb.yaml").write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")
    return bench.cli("train", "bomb.yaml")


@fault("a yaml key given twice", "sft.yaml:", "the key 'seed' is given twice")
def _(bench):
    Path("sft.yaml").write_text(Path("sft.yaml").read_text() + "seed: 1\n")
    return bench.cli("train", "sft.yaml")


@fault("a decay outside its range", "training.betas[0]", "less than 1, got 2.0")
def _(bench):
    return bench.cli("train", "sft.yaml", "training.betas=[2.0,3.0]")


@fault("a seed that torch does not take", "command line: seed: should be less than")
def _(bench):
    return bench.cli("train", "sft.yaml", "seed=99999999999999999999999")


@fault("a schema where no file can be", "cannot be written")
def _(bench):
    return bench.cli("schema", "manifest.jsonl/schema.json")


@fault(
    "an aesthetic score without its MLP", "reward.aesthetic.mlp: there is no file nowhere.pth", "To mend it: download"
)
def _(bench):
    return bench.cli(
        "train", "vader.yaml", "reward={space: pixel, target: 10.0, shape: hinge, aesthetic: {mlp: nowhere.pth}}"
    )


@fault("a watch over too few prompts", "data.prompts.validation", "stop_on_hacking compares 4 prompts")
def _(bench):
    return bench.cli("train", "prfl.yaml", "evaluation.stop_on_hacking=true", "evaluation.every=1")


@fault(
    "held-out prompts among the training rows", "manifest.jsonl", "rows for training have a prompt of data.prompts.test"
)
def _(bench):
    Path("test.txt").write_text(Path("train.txt").read_text())
    Path("train.txt").write_text("another prompt\n")
    return bench.cli("train", "sft.yaml")


@fault("a yaml tag that names code", "tag.yaml:1: the tag", "is not read")
def _(bench):
    Path("tag.yaml").write_text("run: !!python/object/apply:os.system ['touch pwned']\n")
    return bench.cli("train", "tag.yaml")


@fault("a size that the model cannot take", "sft.yaml: data: 6 frames", "take 5 or 9")
def _(bench):
    return bench.cli("train", "sft.yaml", "data.frames=6")


# --------------------------------------------------------------------------------------------- adapters and gradients


@fault("no adapter to train", "sft.yaml: backbone.adapter: missing", "adapter: {rank: 16, alpha: 16}")
def _(bench):
    text = yaml.safe_load(Path("sft.yaml").read_text())
    del text["backbone"]["adapter"]
    Path("sft.yaml").write_text(yaml.safe_dump(text))
    return bench.cli("train", "sft.yaml")


@fault("LoRA targets that match nothing", "sft.yaml: backbone.adapter.targets", "['q_proj']", "choose among", "to_q")
def _(bench):
    return bench.cli("train", "sft.yaml", "backbone.adapter.targets=[q_proj]")


@fault("nothing trainable", "objective: nothing is trainable", "add an adapter")
def _(bench):
    backbone = with_policy(load_backbone(bench.model))
    for parameter in backbone.adapter_parameters("policy").values():
        parameter.requires_grad_(False)
    objective = Sft(backbone, dataset(backbone), seed=0)
    run = RunFolder(Path("runs/new"))
    settings = TrainingConfig(steps=1, batch=1, learning_rate=1e-3)
    return bench.call(train, objective, settings, run, accelerator=make_accelerator(run, "cpu", []))


@fault("an adapter that changes the model at step 0", "backbone.adapter", "changes the model before the first step")
def _(bench):
    plain = adapters.LoraConfig
    bench.patch.setattr(adapters, "LoraConfig", lambda **named: plain(**named, init_lora_weights=False))
    return bench.cli("train", "sft.yaml", "run=runs/new")


@fault("no gradient in the first step", "no gradient reached any", "hinge target", leaves=("runs/prfl",))
def _(bench):
    message = bench.cli("train", "prfl.yaml", "reward.shape=hinge", "reward.target=-1e6")
    assert not Path("runs/prfl/checkpoints").exists()
    return message


@fault("a reward that cannot be differentiated", "vader.yaml: reward:", "take a differentiable reward")
def _(bench):
    bench.patch.setattr(PixelReward, "differentiable", False)
    return bench.cli("train", "vader.yaml")


@fault("a reward that runs under no_grad", "gives no gradient to the latents", "no_grad", leaves=("runs/prfl",))
def _(bench):
    bench.patch.setattr(LatentReward, "__call__", torch.no_grad()(LatentReward.__call__))
    return bench.cli("train", "prfl.yaml")


@fault("a pixel reward at noisy latents", "objective.handoff", "cannot score a noisy latent", "handoff: clean")
def _(bench):
    return bench.cli("train", "prfl.yaml", "reward.space=pixel", "reward.path=heads/pixel")


@fault("a reward that does not know noise at sigma > 0", "it is not noise-aware", "take a latent reward")
def _(bench):
    backbone = with_policy(load_backbone(bench.model))
    return bench.call(pixel_objective, backbone, Prfl(euler(chain_sigmas(4, 3.0)), seed=0))


# ------------------------------------------------------------------------------------------------------- not finite


def dumped(run: str, step: int) -> dict:
    """The batch that a stop left; and no checkpoint of a step that was taken on it."""
    folder = Path(run, "failed", f"step-{step:06d}")
    assert load_file(folder / "batch.safetensors")
    assert not Path(run, "checkpoints", f"step-{step + 1:06d}").exists()
    return json.loads((folder / "batch.json").read_text())


@fault("a loss that is not finite", "loss is", "in step 1", "has not stepped", "learning rate", leaves=("runs/new",))
def _(bench):
    message = bench.cli("train", "sft.yaml", "run=runs/new", "training.learning_rate=1e25")
    assert dumped("runs/new", 1)["indices"] == [2, 3]
    return message


@fault("a gradient that is not finite", "gradient_norm is nan in step 0", "runs/new/failed", leaves=("runs/new",))
def _(bench):
    accumulate = Sft.accumulate

    def wild(self, step, indices):
        metrics = accumulate(self, step, indices)
        next(iter(self.parameters().values())).grad.view(-1)[0] = math.nan
        return metrics

    bench.patch.setattr(Sft, "accumulate", wild)
    message = bench.cli("train", "sft.yaml", "run=runs/new")
    dumped("runs/new", 0)
    return message


@fault("latents that are not finite", "latents/max is nan in step 0", "the batch is in that", leaves=("runs/prfl",))
def _(bench):
    velocity = WanBackbone.velocity
    bench.patch.setattr(
        WanBackbone, "velocity", lambda self, x, *args: velocity(self, x, *args) * (math.nan, 1)[len(x) == 1]
    )
    message = bench.cli("train", "prfl.yaml")
    dumped("runs/prfl", 0)
    return message


@fault("a reward that is not finite", "reward is nan in step 0", "runs/prfl/failed/step-000000", leaves=("runs/prfl",))
def _(bench):
    reward = LatentReward.from_pretrained("heads/latent", load_backbone(bench.model))
    with torch.no_grad():
        reward.head.project.bias.fill_(math.nan)
    reward.save_pretrained("heads/latent")
    message = bench.cli("train", "prfl.yaml")
    dumped("runs/prfl", 0)
    return message


@fault("weights that are not finite", "are not finite after step 1; they are not saved", leaves=("runs/new",))
def _(bench):
    def wild(optimizer, rate):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(math.inf)

    bench.patch.setattr("prfl.training.loop.apply", wild)
    message = bench.cli("train", "sft.yaml", "run=runs/new")
    assert not Path("runs/new/checkpoints").exists()
    return message


@fault("a cached clip that is not finite", "cached latents are not finite", "run `prfl cache` again")
def _(bench):
    for entry in Path("cache/latents").glob("*.safetensors"):
        save_file({"latents": torch.full_like(load_file(entry)["latents"], math.inf)}, entry)
    return bench.cli("train", "sft.yaml", "run=runs/new")


@fault("processes with different weights", "process 0 and process 1", "resume all of them from the same checkpoint")
def _(bench):
    backbone = with_policy(load_backbone(bench.model))
    mine = {name: value.detach().clone() for name, value in backbone.adapter_parameters("policy").items()}
    theirs = {name: value + (name.endswith("to_q.lora_B.weight")) * 1e-7 for name, value in mine.items()}
    digests = [{name: guards.digest(value) for name, value in rank.items()} for rank in (mine, theirs)]
    bench.patch.setattr(guards, "gather_object", lambda own: [*own, digests[1]] if own == digests[:1] else None)

    class Two(Accelerator):
        num_processes = 2

        def __init__(self):
            pass

    return bench.call(guards.check_same_on_ranks, mine, Two())


@fault("a model whose output is not finite", "backbone.model: the model's output is not finite", "float32")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"].fill_(math.nan)
    save_file(tensors, path, metadata={"format": "pt"})
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


# ------------------------------------------------------------------------------------------- what does not fit together


@fault("a head for a model with other blocks", "does not fit this backbone", "num_blocks: 3 there, 4 here", "load")
def _(bench):
    return bench.cli("train", "prfl.yaml", bench.other_model(num_layers=4))


@fault("a head for a model with other weights", "transformer_fingerprint", "or train a reward here")
def _(bench):
    return bench.cli("train", "prfl.yaml", bench.other_model())


@fault("a head for other latent statistics", "does not fit", "latents_std")
def _(bench):
    path = bench.copied_model() / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "latents_std": [1.0, 1.0, 1.0, 1.0]}))
    return bench.cli("train", "prfl.yaml", "backbone.model=model")


@fault("a head for another sigma convention", "heads/latent: the reward does not fit", "sigma_convention")
def _(bench):
    path = Path("heads/latent/config.json")
    config = json.loads(path.read_text())
    config["backbone"]["sigma_convention"] = "x = sigma x0 + (1 - sigma) noise"
    path.write_text(json.dumps(config))
    return bench.cli("train", "prfl.yaml")


@fault("a head for another frame rate", "prfl.yaml: data.fps: 16, but", "with 8", "data.fps: 8, or train")
def _(bench):
    return bench.cli("train", "prfl.yaml", "data.fps=16")


@fault("a head for another resolution", "prfl.yaml: data.height: 32, but", "height: 16")
def _(bench):
    return bench.cli("train", "prfl.yaml", "data.height=32")


@fault("a weight on a score that the reward lacks", "prfl.yaml: reward.weights", "no such", "speed", "light, calm")
def _(bench):
    return bench.cli("train", "prfl.yaml", "reward.weights={speed: 1}")


@fault("a pixel reward given as a latent one", "prfl.yaml: reward.space", "is a pixel one", "space: pixel")
def _(bench):
    return bench.cli("train", "prfl.yaml", "reward.path=heads/pixel")


@fault(
    "a cache made for another model", "4 videos are not in the cache for this model", "4 entries are of", "prfl cache"
)
def _(bench):
    other = load_backbone(save_tiny_pipeline(bench.folder / "other", seed=1))
    return bench.call(load_dataset, other, "manifest.jsonl", "cache", **CLIP)


# --------------------------------------------------------------------------------------------------- prompts and labels


@fault("no prompts", "train.txt: holds no prompts", "one prompt on each line")
def _(bench):
    Path("train.txt").write_text("\n  \n")
    return bench.cli("train", "prfl.yaml")


@fault("an empty prompt", "manifest.jsonl:2: 'prompt'", "mend this row")
def _(bench):
    bench.rows(lambda rows: rows[1].update(prompt=" "))
    return bench.cli("train", "sft.yaml", "run=runs/new")


@fault("a prompt that stands twice", "train.txt:3", "stands already at train.txt:1", "remove one")
def _(bench):
    Path("train.txt").write_text("a red circle\na blue square\na red circle\n")
    return bench.cli("train", "prfl.yaml")


@fault("a prompt that is trained on and tested on", "data.prompts.test: the prompt 'a red circle' is in train too")
def _(bench):
    Path("test.txt").write_text("a red circle\n")
    return bench.cli("train", "prfl.yaml")


@fault("a label outside its range", "manifest.jsonl:3: 'label.light'", "less than or equal to 1", "found '7.0'")
def _(bench):
    bench.rows(lambda rows: rows[2]["label"].update(light=7.0))
    return bench.cli("train", "reward.yaml")


@fault("labels that are all of one kind", "reward.yaml: data.manifest", "'calm'", "all 1", "both good and bad")
def _(bench):
    bench.rows(lambda rows: [row["label"].update(calm=1.0) for row in rows])
    return bench.cli("train", "reward.yaml")


@fault("pairs that are all ties", "data.manifest", "'calm' with the loss bradley_terry", "all ties", "labels differ")
def _(bench):
    loss = "objective.loss=bradley_terry"
    bench.rows(lambda rows: [row["label"].update(calm=float(row["prompt"] == "a red circle")) for row in rows])
    return bench.cli("train", "reward.yaml", loss)


@fault("a label that nobody gave", "reward.head.dimensions", "no label 'calmness'", "did you mean 'calm'")
def _(bench):
    return bench.cli("train", "reward.yaml", "reward.head.dimensions=[calmness]")


# ------------------------------------------------------------------------------------------------------ malformed input


@fault("a truncated video", "clips/0.mp4: cannot be decoded", "skip_unreadable")
def _(bench):
    data = Path("clips/0.mp4").read_bytes()
    Path("clips/0.mp4").write_bytes(data[: len(data) // 2])
    return bench.cli("train", "reward.yaml")


@fault("an empty video", "clips/0.mp4: cannot be decoded", "mend or remove")
def _(bench):
    Path("clips/0.mp4").write_bytes(b"")
    return bench.cli("train", "reward.yaml")


@fault("a file with the wrong extension", "'.txt' is no video suffix", "clips/0.txt")
def _(bench):
    Path("clips/0.mp4").rename("clips/0.txt")
    bench.rows(lambda rows: rows[0].update(video="clips/0.txt"))
    return bench.cli("train", "reward.yaml", "data.cache=cache/new")


@fault("a playlist called .mp4", "clips/0.mp4: cannot be decoded")
def _(bench):
    Path("clips/0.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n1.mp4\n#EXT-X-ENDLIST\n")
    return bench.cli("train", "reward.yaml")


@fault("a video of 65535 x 65535", "clips/0.gif: ")
def _(bench):
    write_video("clips/0.gif", torch.rand(3, 5, 16, 16), 8)
    data = bytearray(Path("clips/0.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    Path("clips/0.gif").write_bytes(bytes(data))
    bench.rows(lambda rows: rows[0].update(video="clips/0.gif"))
    return bench.cli("train", "reward.yaml")


def patch_header(box: bytes, offset: int, *numbers: int) -> None:
    """Overwrite big-endian 32-bit numbers in the first box of that name in clips/0.mp4."""
    data = bytearray(Path("clips/0.mp4").read_bytes())
    at = data.index(box) + offset
    data[at : at + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    Path("clips/0.mp4").write_bytes(bytes(data))


@fault("a header that claims a million pictures", "clips/0.mp4: holds no pictures", "mend or remove")
def _(bench):
    patch_header(b"stsz", 12, 1_000_000)
    return bench.cli("train", "reward.yaml")


@fault("a header that claims a shape beyond reason", "clips/0.mp4: claims that its pixels", "mend or remove")
def _(bench):
    patch_header(b"tkhd", 80, 0x86A00000, 0xFFFF0000)
    return bench.cli("train", "reward.yaml")


@fault("a broken JSON line", "manifest.jsonl:5: is not JSON", "one JSON object on each line")
def _(bench):
    with open("manifest.jsonl", "a") as file:
        file.write('{"video": "clips/0.mp4", ')
    return bench.cli("train", "reward.yaml")


@fault("a path that leaves the manifest's folder", "'../secret.mp4' leaves the manifest's folder", "move the file")
def _(bench):
    shutil.copy("clips/0.mp4", "../secret.mp4")
    bench.rows(lambda rows: rows[0].update(video="../secret.mp4"))
    return bench.cli("train", "reward.yaml")


@fault("a link that leaves the manifest's folder", "manifest.jsonl:1: 'clips/link.mp4' leaves", "a folder above it")
def _(bench):
    shutil.copy("clips/0.mp4", "../secret.mp4")
    os.symlink(Path("../secret.mp4").absolute(), "clips/link.mp4")
    bench.rows(lambda rows: rows[0].update(video="clips/link.mp4"))
    return bench.cli("train", "reward.yaml")


@fault("a video that is not there", "manifest.jsonl:1: no such file: clips/9.mp4", "relative to")
def _(bench):
    bench.rows(lambda rows: rows[0].update(video="clips/9.mp4"))
    return bench.cli("train", "reward.yaml")


# -------------------------------------------------------------------------------------------------------- model folders


def lying(path: Path) -> bytes:
    """A safetensors file whose header claims to be a terabyte long."""
    content = (2**40).to_bytes(8, "little") + path.read_bytes()[8:]
    path.write_bytes(content)
    return content


@fault("a model that is not there", "nowhere: cannot load the model index", "a diffusers pipeline folder or a hub id")
def _(bench):
    bench.patch.setenv("HF_HUB_OFFLINE", "1")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=./nowhere")


@fault("a safetensors file with a lying header", "model: cannot load the transformer")
def _(bench):
    lying(bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


def drop_one(path: Path, part: str) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in tensors if part in name)]
    save_file(tensors, path, metadata={"format": "pt"})


@fault("a model that lacks a weight", "model/transformer", "the file lacks blocks.0.attn1.to_q.weight", "again, whole")
def _(bench):
    drop_one(bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors", "attn1.to_q.weight")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


@fault("a text encoder that lacks a weight", "model/text_encoder", "the file lacks", "again, whole")
def _(bench):
    drop_one(bench.copied_model() / "text_encoder/model.safetensors", "SelfAttention.q")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model", "data.cache=cache/new")


@fault("a model in pickles", "model: cannot load the transformer", "no file named", ".safetensors")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")


@fault("a model that brings its own code", "cannot load the text encoder or tokenizer", "custom code")
def _(bench):
    folder = bench.copied_model() / "tokenizer"
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('pwned').touch()\nclass Evil: pass\n")
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model", "data.cache=cache/new")


# ---------------------------------------------------------------------------------------------------------- saved parts


@fault("a reward whose config is no JSON", "heads/latent/config.json: is not JSON", "save or download")
def _(bench):
    path = Path("heads/latent/config.json")
    path.write_text(path.read_text()[:100])
    return bench.cli("train", "prfl.yaml")


@fault(
    "a reward whose weights were exchanged", "is not the file that config.json was written for", "download the reward"
)
def _(bench):
    lying(Path("heads/latent/reward.safetensors"))
    return bench.cli("train", "prfl.yaml")


@fault("a reward with a lying header and the right hash", "reward.safetensors: is damaged", "download the reward again")
def _(bench):
    path = Path("heads/latent/config.json")
    lied = hashlib.sha256(lying(Path("heads/latent/reward.safetensors"))).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights_sha256": lied}))
    return bench.cli("train", "prfl.yaml")


@fault("a reward whose config does not fit its weights", "heads/latent: the config and the weights do not describe")
def _(bench):
    path = Path("heads/latent/config.json")
    config = json.loads(path.read_text())
    config["head"]["inner"] = 16
    path.write_text(json.dumps(config))
    return bench.cli("train", "prfl.yaml")


@fault("a trained policy that is truncated", "runs/sft/policy.safetensors: is damaged", "run `prfl train`")
def _(bench):
    path = Path("runs/sft/policy.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    return bench.cli("sample", "sft.yaml")


# ------------------------------------------------------------------------------------------- checkpoints and resuming

ONE, TWO = Path("runs/sft/checkpoints/step-000001"), Path("runs/sft/checkpoints/step-000002")


@fault(
    "a full disk while a checkpoint is saved",
    "runs/sft/checkpoints/step-000003: cannot be written: No space left on device",
    "free some space",
    leaves=("runs/sft/metrics.jsonl", "runs/sft/config.yaml"),
)
def _(bench):
    def full(_):
        raise OSError(28, "No space left on device")

    bench.patch.setattr("prfl.data.files.os.fsync", full)
    message = bench.cli("train", "sft.yaml", "training.steps=3")
    bench.patch.undo()
    bench.patch.chdir(bench.folder)
    assert sorted(path.name for path in Path("runs/sft/checkpoints").iterdir()) == [ONE.name, TWO.name]
    assert cli.main(["train", "sft.yaml", "training.steps=3"]) == 0, "and the run goes on from there"
    return message


@fault("a truncated checkpoint", "step-000002: the checkpoint is damaged: weights.safetensors has", f"--resume {ONE}")
def _(bench):
    path = TWO / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    return bench.cli("train", "sft.yaml", "training.steps=3", "--resume", str(TWO))


@fault("a checkpoint with a lying header", f"{TWO}/weights.safetensors: is damaged", f"--resume {ONE}")
def _(bench):
    lying(TWO / "weights.safetensors")
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("no whole checkpoint is left", "state.json cannot be read", "the run starts anew")
def _(bench):
    shutil.rmtree(ONE)
    (TWO / "state.json").write_text("{")
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("a key changed on resuming", "seed: 0 -> 1; training.batch: 2 -> 4", "put these keys back")
def _(bench):
    return bench.cli("train", "sft.yaml", "training.steps=3", "seed=1", "training.batch=4")


@fault("clips changed on resuming", "data (clips and labels)", "train in another run folder")
def _(bench):
    bench.rows(lambda rows: rows.pop())
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("prompts changed on resuming", "data.prompts.train (content)", "put these keys back")
def _(bench):
    Path("train.txt").write_text("a yellow triangle\n")
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("a reward trained again before resuming", "reward.path (weights)")
def _(bench):
    assert cli.main(["train", "prfl.yaml", "training.steps=1"]) == 0
    reward = LatentReward.from_pretrained("heads/latent", load_backbone(bench.model))
    with torch.no_grad():
        reward.head.project.bias.add_(0.1)
    reward.save_pretrained("heads/latent")
    return bench.cli("train", "prfl.yaml")


@fault("starting anew where a run lies", "already has checkpoints", "another run folder")
def _(bench):
    return bench.cli("train", "sft.yaml", "--resume", "none")


@fault("resuming from nothing", "nowhere: there is no checkpoint to resume from", "give a step-N or a run folder")
def _(bench):
    return bench.cli("train", "sft.yaml", "--resume", "nowhere")


@fault("resuming behind newer checkpoints", "step-000002 is newer", "a folder of its own")
def _(bench):
    return bench.cli("train", "sft.yaml", "--resume", str(ONE))


@fault("one checkpoint for several stages", "--resume: one checkpoint for 2 stages", "prfl train prfl.yaml --resume")
def _(bench):
    return bench.cli("train", "story.yaml", "--resume", str(ONE))


# ---------------------------------------------------------------------------------------------------------- what is not


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on(bench: Bench) -> None:
    """auto: a run that a scheduler starts again must not need a person; but it says what it does."""
    before = {path.name: path.read_bytes() for path in TWO.iterdir()}
    metrics = Path("runs/sft/metrics.jsonl").read_text()
    (TWO / "optimizer.safetensors").write_bytes(b"")
    bench.capsys.readouterr()
    assert cli.main(["train", "sft.yaml"]) == 0
    said = bench.capsys.readouterr().out
    assert f"{TWO} is damaged: it is now called damaged-step-000002" in said.replace("\n", "")
    again = {path.name: path.read_bytes() for path in TWO.iterdir()}
    assert again == before, "the same step, trained again from the one before, is the same bit for bit"
    own = r'"(?:seconds|peak_gib)[^,}]*'  # of the process, not of the training
    timeless = [re.sub(own, "", text) for text in (metrics, Path("runs/sft/metrics.jsonl").read_text())]
    assert timeless[0] == timeless[1]


def test_no_pickle_is_loaded_and_no_remote_code_is_trusted() -> None:
    """In the sources; torch.load only with weights_only=True."""
    root = Path(cli.__file__).parent
    sources = {path: path.read_text() for folder in (root, root.parent / "kernels") for path in folder.rglob("*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        assert not re.search(r"pickle\.(?:loads?|Unpickler)\b|\b(?:dill|joblib|marshal|shelve)\b", text), path
        assert not re.search(r"allow_pickle\s*=\s*True|trust_remote_code\s*=\s*(?!False)", text), path
        assert not re.search(r"yaml\.(?:unsafe_|full_)?load\((?!text, StrictLoader)", text), path
        for call in re.finditer(r"torch\.load\(", text):
            assert "weights_only=True" in text[call.start() : call.start() + 200], path
        weights = r"(?:WanTransformer3DModel|AutoencoderKLWan|UMT5EncoderModel|CLIPModel|kind)\.from_pretrained\("
        for call in re.finditer(weights, "" if path.name == "card.py" else text):  # a card shows code to its reader
            assert "use_safetensors=True" in text[call.start() : call.start() + 300], path


class Table:
    """pytest plugin: collects the messages and prints them at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call" and "message" in found:
            self.rows.append((found["fault"], found["message"]))

    def print(self) -> None:
        print("| fault | message |\n| --- | --- |")
        for name, message in self.rows:
            cell = message.replace("|", "\\|").replace("\n  ", "<br>").replace("\n", "<br>")
            print(f"| {name} | {cell} |")


if __name__ == "__main__":
    table = Table()
    plain = ["-o", "addopts=--import-mode=importlib"]  # types are checked only where prfl is not imported yet
    code = pytest.main([__file__, *plain, "-q", "-k", "test_fault["], plugins=[table])
    table.print()
    sys.exit(code)
