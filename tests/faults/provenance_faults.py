"""Results of another training, model, adapter or config, and damaged files of the right size."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prfl import cli
from prfl.backbone import load_backbone
from prfl.reward import LatentReward
from prfl.reward.pixel import PixelReward
from tests.faults.planting import fault, warning

POLICY = Path("runs/sft/policy.safetensors")
ONE, TWO = Path("runs/sft/checkpoints/step-000001"), Path("runs/sft/checkpoints/step-000002")
FULL = ("run=runs/full", "backbone.train=full", "backbone.adapter=null", "training.learning_rate=1e-5")


def rewritten(path: Path, change: Any = None, **stamp: Any) -> None:
    """A safetensors file with other tensors, or another stamp."""
    with safe_open(path, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(path)
    if change:
        change(tensors)
    if stamp:
        metadata["prfl"] = json.dumps(json.loads(metadata["prfl"]) | stamp)
    save_file(tensors, path, metadata)


def first_is_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)].view(-1)[0] = math.nan


def stopped_half_way(bench, *overrides: str) -> None:
    """The run of the template, told to go on for longer, and stopped after one more step."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    bench.patch.setattr("prfl.runs.stage.show_report", interrupted)
    bench.patch.setattr("prfl.training.loop.run_hooks", lambda *_: None)
    assert cli.main(["train", "sft.yaml", "training.steps=3", *overrides]) == 130
    bench.patch.undo()
    bench.patch.chdir(bench.folder)


# ------------------------------------------------------------------------------------------ of another training


@fault("export of a run that went on and was stopped", "there is no trained policy", "let `prfl train` finish this run")
def _(bench):
    stopped_half_way(bench)
    (aside,) = Path("runs/sft").glob("earlier-000002-*")
    assert cli.main(["export", str(aside)]) == 0, "what was there is whole, with its own step"
    assert "| steps | 2 |" in (aside / "export/README.md").read_text()
    return bench.cli("export", "runs/sft")


@fault(
    "a policy of an earlier step in the run folder", "after step 2, and the run has gone on to step 3", "finish this"
)
def _(bench):
    shutil.copy(POLICY, "old.safetensors")
    stopped_half_way(bench)
    shutil.copy("old.safetensors", POLICY)
    return bench.cli("sample", "sft.yaml")


@fault("a policy of another run in the run folder", f"{POLICY}: it is of another run", "than the checkpoints beside it")
def _(bench):
    assert cli.main(["train", "sft.yaml", "run=runs/other", "seed=1"]) == 0
    shutil.copy("runs/other/policy.safetensors", POLICY)
    return bench.cli("export", "runs/sft")


@fault(
    "a reward of an earlier step", "runs/reward/reward: it was written after step 1, and the run has gone on to step 2"
)
def _(bench):
    assert cli.main(["train", "reward.yaml"]) == 0
    path = Path("runs/reward/reward/prfl.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end": 1}))
    return bench.cli("train", "prfl.yaml", "reward.path=runs/reward/reward")


# ------------------------------------------------------------------------------- of another model, adapter, config


@fault(
    "a policy on another base of the same shapes",
    "from another model than other: another transformer",
    "backbone.model",
)
def _(bench):
    return bench.cli("sample", "sft.yaml", bench.other_model())


@fault("a policy on the same weights with other heads", "another settings of transformer or VAE", "backbone.model")
def _(bench):
    path = bench.copied_model() / "transformer/config.json"
    heads = {"num_attention_heads": 4, "attention_head_dim": 6}
    path.write_text(json.dumps({**json.loads(path.read_text()), **heads}))
    return bench.cli("sample", "sft.yaml", "backbone.model=model")


@fault(
    "a policy sampled with another alpha", "trained with alpha 2, and the config says 20", "back to 2, or train again"
)
def _(bench):
    return bench.cli("sample", "sft.yaml", "backbone.adapter.alpha=20")


@fault("a policy sampled with another rank", "trained with rank 2, and the config says 4", "backbone.adapter.rank")
def _(bench):
    return bench.cli("sample", "sft.yaml", "backbone.adapter.rank=4")


@fault("an alpha edited in the run's config", "trained with alpha 2", "backbone.adapter.alpha back to 2")
def _(bench):
    path = Path("runs/sft/config.yaml")
    path.write_text(path.read_text().replace("alpha: 2", "alpha: 20"))
    return bench.cli("export", "runs/sft")


@fault(
    "a run's config edited before export", "runs/sft/config.yaml: the config is not the one", "training.batch: 2 -> 4"
)
def _(bench):
    path = Path("runs/sft/config.yaml")
    path.write_text(path.read_text().replace("batch: 2", "batch: 4"))
    return bench.cli("export", "runs/sft")


@fault("the model's schedule changed on resuming", "backbone.model (settings)", "train in another run folder")
def _(bench):
    path = bench.copied_model() / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 5.0}))
    return bench.cli("train", "sft.yaml", "training.steps=3", "backbone.model=model")


# -------------------------------------------------------------------------------------- damaged, or not finite


@fault("a policy of nan", f"{POLICY}: weights that are not finite: blocks.0.attn1.to_k.lora_A.weight", "learning_rate")
def _(bench):
    rewritten(POLICY, first_is_nan)
    return bench.cli("sample", "sft.yaml")


@fault("export of a policy of nan", f"{POLICY}: weights that are not finite: blocks.0.attn1.to_k.lora_A.weight")
def _(bench):
    rewritten(POLICY, first_is_nan)
    return bench.cli("export", "runs/sft")


@fault("a policy with other weights under its stamp", f"{POLICY}: is damaged: its weights are not as they were written")
def _(bench):
    rewritten(POLICY, lambda tensors: tensors[min(tensors)].mul_(2))
    return bench.cli("sample", "sft.yaml")


@fault("a policy whose stamp is malformed", f"{POLICY}: is damaged: what made it cannot be read", "run `prfl train`")
def _(bench):
    rewritten(POLICY, step="many")
    return bench.cli("sample", "sft.yaml")


@fault(
    "a fine-tuned transformer with a flipped bit", "is not as it was written", "run `prfl train` on this config again"
)
def _(bench):
    assert cli.main(["train", "sft.yaml", *FULL]) == 0
    path = Path("runs/full/transformer/diffusion_pytorch_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    return bench.cli("export", "runs/full")


def scored(bench, head: str) -> str:
    return bench.cli("score", "clips/0.mp4", "--prompt", "a red circle", "--head", head, "--model", str(bench.model))


@fault("scores of a latent reward of nan", "heads/latent/reward.safetensors: weights that are not finite: head.project")
def _(bench):
    reward = LatentReward.from_pretrained("heads/latent", load_backbone(bench.model))
    first_is_nan({"bias": reward.head.project.bias.data})
    reward.save_pretrained("heads/latent")
    return scored(bench, "heads/latent")


@fault("scores of a pixel reward of inf", "heads/pixel/reward.safetensors: weights that are not finite: mlp.3.bias")
def _(bench):
    reward = PixelReward.from_pretrained("heads/pixel")
    reward.network.mlp[3].bias.data.fill_(math.inf)
    reward.save_pretrained("heads/pixel")
    return scored(bench, "heads/pixel")


@fault("a model of nan", "model/transformer: weights that are not finite: proj_out.bias", "download or save the model")
def _(bench):
    path = bench.copied_model() / "transformer/diffusion_pytorch_model.safetensors"
    rewritten(path, lambda tensors: tensors["proj_out.bias"].fill_(math.nan))
    return bench.cli("sample", "sft.yaml", "backbone.model=model")


def resumed(bench, path: Path = TWO) -> str:
    return bench.cli("train", "sft.yaml", "training.steps=3", "--resume", str(path))


@fault("a checkpoint with a flipped bit", f"{TWO}: the checkpoint is damaged: weights.safetensors is not as", f"{ONE}")
def _(bench):
    path = TWO / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    return resumed(bench)


@fault("a checkpoint with zeroed weights", f"{TWO}: the checkpoint is damaged: weights.safetensors is not as it was")
def _(bench):
    rewritten_zero = {name: torch.zeros_like(value) for name, value in load_file(TWO / "weights.safetensors").items()}
    save_file(rewritten_zero, TWO / "weights.safetensors")
    return resumed(bench)


@fault("a checkpoint with another step's file", f"{TWO}: the checkpoint is damaged: optimizer.safetensors is not as it")
def _(bench):
    shutil.copy(ONE / "optimizer.safetensors", TWO / "optimizer.safetensors")
    return resumed(bench)


@fault("a checkpoint under another step's name", "step-000003: the checkpoint is damaged", "and holds step 2")
def _(bench):
    TWO.rename("runs/sft/checkpoints/step-000003")
    return resumed(bench, Path("runs/sft/checkpoints/step-000003"))


@fault("a checkpoint whose state was edited", "the checkpoint is damaged: state.json was changed since it was written")
def _(bench):
    path = TWO / "state.json"
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 9'))
    return resumed(bench)


@fault("an older checkpoint that is not finite", "weights.safetensors: weights that are not finite", f"--resume {ONE}")
def _(bench):
    as_of_old(TWO)
    tensors = load_file(TWO / "weights.safetensors")
    first_is_nan(tensors)
    save_file(tensors, TWO / "weights.safetensors")
    return resumed(bench)


def as_of_old(path: Path, clips: str = "of the entries of another cache") -> None:
    """A checkpoint's state.json as older versions wrote it: sizes alone, and places in the identity."""
    facts = json.loads((path / "state.json").read_text())
    identity = facts["identity"]
    del facts["sha256"], facts["checksum"], identity["version of this identity"]
    del identity["backbone.model (settings)"], identity["data (videos and labels)"]
    identity |= {"backbone.model": "models/somewhere", "data.cache": "/elsewhere", "data (clips and labels)": clips}
    (path / "state.json").write_text(json.dumps(facts))


@fault(
    "an older checkpoint of other clips",
    "data (clips and labels): 'of the entries of another cache' -> ",
    "lay at data,",
)
def _(bench):
    as_of_old(TWO)
    return resumed(bench)


@warning("a policy of an older prfl", "runs/sft/policy.safetensors is of an older prfl and does not say what made it")
def _(bench):
    save_file(load_file(POLICY), POLICY)
    return bench.warned("sample", "sft.yaml")
