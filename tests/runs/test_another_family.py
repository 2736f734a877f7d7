"""The commands from labels to a policy on families that are not Wan: nothing in them knows which a model is of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from prfl import cli
from prfl.backbone import load_backbone
from prfl.config import load_config
from prfl.factory.backbone import build_backbone
from prfl.reward import LatentReward, RewardHead
from prfl.utils.errors import PrflError
from tests.cogvideox import save_tiny_cogvideox
from tests.few_levels import measure_few
from tests.models import copies_in_place_of_loading
from tests.modelscope import save_tiny_modelscope
from tests.runs.story_inputs import PROMPTS, assert_went_on, write_inputs
from tests.slow import slow_unless
from tests.svd import save_tiny_svd
from tests.wan_image import save_tiny_pinned_frame, save_tiny_wan_image

HEAD = {"dimensions": ["light"], "hidden": 8}


@dataclass(frozen=True)
class Case:
    """A family.  block: that the head reads.  tensors: of a LoRA.  layer: one that the exported file names.
    from_image: whether its prompts have first frames, and each clip its own."""

    save: Callable[[Path], Path]
    pipeline: str
    network: str
    frames: int
    block: int
    blocks: int
    tensors: int
    layer: str
    from_image: bool = False


CASES = {
    "cogvideox": Case(
        save_tiny_cogvideox, "CogVideoXPipeline", "transformer", 9, 1, 3, 24,
        "transformer.transformer_blocks.0.attn1.to_q",
    ),
    "modelscope": Case(
        save_tiny_modelscope, "TextToVideoSDPipeline", "unet", 3, 2, 5, 144,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "svd": Case(
        save_tiny_svd, "StableVideoDiffusionPipeline", "unet", 3, 2, 5, 128,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", from_image=True,
    ),
    "wan_image": Case(
        save_tiny_wan_image, "WanImageToVideoPipeline", "transformer", 9, 1, 3, 48,
        "diffusion_model.blocks.0.self_attn.q", from_image=True,
    ),
    "wan_pinned_frame": Case(
        save_tiny_pinned_frame, "WanImageToVideoPipeline", "transformer", 9, 1, 3, 48,
        "diffusion_model.blocks.0.self_attn.q", from_image=True,
    ),
}  # fmt: skip


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's model, written once."""
    return cache(lambda family: CASES[family].save(tmp_path_factory.mktemp(family) / "tiny"))


@pytest.fixture
def model(family: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, which is read once."""
    copies_in_place_of_loading(folder_of(family), monkeypatch)
    return folder_of(family)


@pytest.fixture
def configs(family: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> None:
    """A story of four stages: a latent reward, PRFL, a pixel reward, VADER."""
    monkeypatch.chdir(tmp_path)
    measure_few(monkeypatch)
    case = CASES[family]
    base = {"model": str(model)}
    policy = {**base, "adapter": {"rank": 2, "alpha": 2}, "checkpointing": "full"}
    preference = {"name": "preference", "loss": "bce"}
    steer = {"weights": {"light": 1.0}, "shape": "linear"}
    stages = {
        "reward": (base, {"space": "latent", "head": {**HEAD, "blocks": [case.block], "inner": 8}}, preference),
        "prfl": (policy, {"space": "latent", "path": "${stages.reward.run}/reward", **steer},
                 {"name": "prfl", "sft": {"every": 1}}),
        "pixel": (base, {"space": "pixel", "head": HEAD}, preference),
        "vader": (policy, {"space": "pixel", "path": "${stages.pixel.run}/reward", **steer},
                  {"name": "vader", "frames": "one"}),
    }  # fmt: skip
    for name, (backbone, reward, objective) in stages.items():
        config = {
            "version": 1, "seed": 0, "run": f"runs/{name}", "backbone": backbone, "reward": reward,
            "objective": objective, "rollout": {"steps": 2},
            "data": {
                "cache": "cache", "frames": case.frames, "height": 16, "width": 16, "fps": 8,
                "manifest": "manifest.jsonl",
                "prompts": {split: f"{split}.jsonl" for split in PROMPTS},
            },
            "training": {"steps": 2, "batch": 2, "learning_rate": 1e-3, "save_every": 1, "trackers": []},
            "evaluation": {"every": 2, "prompts_per_round": 1, "samples_per_prompt": 1},
        }  # fmt: skip
        if name == "vader":  # it starts from noise and has no regulariser; PRFL's run draws samples
            del config["data"]["manifest"]
            config["evaluation"] = {"every": 0}
        if objective["name"] == "preference":
            config["evaluation"] = {"every": 2}
        if name == "prfl":
            config["evaluation"]["final_samples"] = 1
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": [f"{name}.yaml" for name in stages]}))


@pytest.fixture
def project(family: str, configs: None) -> None:
    """Their prompts and labelled clips."""
    write_inputs(CASES[family].frames, CASES[family].from_image)


def test_from_labels_to_policies(family: str, project: None, capsys: pytest.CaptureFixture) -> None:
    case = CASES[family]
    assert cli.main(["train", "story.yaml"]) == 0, capsys.readouterr().err
    for run in ("prfl", "vader"):
        records = [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if "reward" in record]
        assert len(steps) == 2 and all(record["gradient_norm"] > 0 for record in steps), run
    saved = load_file("runs/prfl/policy.safetensors")
    assert len(saved) == case.tensors and any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)
    with safe_open("runs/prfl/policy.safetensors", "pt") as file:
        stamp = json.loads(file.metadata()["prfl"])
    assert (stamp["family"], stamp["networks"]) == (family, [case.network])

    # It goes on bit for bit, is exported under diffusers' names, and is priced without weights.
    before = load_file("runs/prfl/checkpoints/step-000002/weights.safetensors")
    assert all(torch.equal(before[name], saved[name]) for name in saved)
    again = ["train", "prfl.yaml", "reward.path=runs/reward/reward", "evaluation={every: 0, final_samples: 0}"]
    shutil.copytree("runs/prfl", "runs/broken", ignore=shutil.ignore_patterns("step-000002", "policy.safetensors"))
    assert cli.main([*again, "run=runs/broken"]) == 0
    assert_went_on("runs/prfl", "runs/broken")
    resumed = load_file("runs/broken/policy.safetensors")
    assert all(torch.equal(resumed[name], saved[name]) for name in saved)
    assert cli.main([*again, "--dry-run"]) == 0, capsys.readouterr().err
    assert f"in {case.blocks} blocks" in capsys.readouterr().out
    assert cli.main(["export", "runs/prfl", "--merged"]) == 0, capsys.readouterr().err
    names = load_file("runs/prfl/export/prfl.safetensors").keys()
    assert f"{case.layer}.lora_A.weight" in names
    merged = load_file(f"runs/prfl/export/{case.network}/diffusion_pytorch_model.safetensors")
    assert not any("lora" in name for name in merged)
    start = ["backbone.adapter.init=runs/prfl/export/prfl.safetensors", "run=runs/again", "training.steps=1"]
    assert cli.main([*again, *start]) == 0, capsys.readouterr().err
    assert f"prfl.safetensors: {case.tensors // 2} layers" in capsys.readouterr().out.replace("\n", "")
    card = Path("runs/prfl/export/README.md").read_text()
    assert f"{case.pipeline}.from_pretrained" in card and ("ComfyUI" in card) == family.startswith("wan_")
    assert f"pipeline_tag: {'image' if case.from_image else 'text'}-to-video" in card
    assert ("PeftAdapterMixin" in card) == (family in ("modelscope", "svd"))
    assert ("unet.load_lora_adapter(" in card) == (family == "svd")


@pytest.mark.slow
def test_all_weights_are_trained_and_exported(
    family: str, model: Path, project: None, capsys: pytest.CaptureFixture
) -> None:
    network, untrained = CASES[family].network, load_backbone(model)
    torch.manual_seed(0)
    head = RewardHead(untrained.facts.width_after([CASES[family].block]), ["light"], inner=8, hidden=8)
    LatentReward(head, untrained, [CASES[family].block]).save_pretrained("runs/reward/reward")
    full = ["backbone.train=full", "backbone.adapter=null", "reward.path=runs/reward/reward", "run=runs/full"]
    full += ["evaluation={every: 0, final_samples: 0}"]
    assert cli.main(["train", "prfl.yaml", *full]) == 0, capsys.readouterr().err
    assert cli.main(["export", "runs/full"]) == 0, capsys.readouterr().err
    file = "diffusion_pytorch_model.safetensors"
    base, trained = (load_file(f"{folder}/{network}/{file}") for folder in (model, "runs/full/export"))
    assert base.keys() == trained.keys() and any(not torch.equal(base[name], trained[name]) for name in base)
    assert cli.main(["sample", "prfl.yaml", *full, "--prompt", "a red circle", "--best-of", "2"]) == 0
    assert list(Path("runs/full/samples").glob("steered-*/**/*.mp4"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.cheaper={cache: 0.1}", "rollout.cheaper: a FAMILY model has no cheaper calls"),
        ("backbone.compile=true", "backbone.compile: the blocks of a FAMILY model are not compiled"),
        ("backbone.kernels=triton", "backbone.kernels: prfl_kernels has no .*lora_linear.* for a FAMILY model"),
        ("backbone.attention=flash", "backbone.attention: a FAMILY model has no attention by flash"),
    ],
    ids=lambda value: value.partition("=")[0],
)
@pytest.mark.parametrize(
    "family",
    slow_unless("svd".__ne__, [name for name in CASES if name != "wan_pinned_frame"]),  # which has all
    indirect=True,
)
def test_what_the_family_has_not_is_refused_by_name(family: str, configs: None, override: str, message: str) -> None:
    config = load_config("prfl.yaml", ["reward.path=absent", override])
    with pytest.raises(PrflError, match=message.replace("FAMILY", family)):
        build_backbone(config)
