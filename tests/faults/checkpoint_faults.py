"""Checkpoints and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from prfl import cli
from prfl.backbone import load_backbone
from prfl.reward import LatentReward
from prfl.utils import files
from tests.faults.planting import fault, lying

ONE, TWO = Path("runs/sft/checkpoints/step-000001"), Path("runs/sft/checkpoints/step-000002")


@fault(
    "a full disk while a checkpoint is saved",
    "runs/sft/checkpoints/step-000003: cannot be written: No space left on device",
    "free some space",
    leaves=("runs/sft/metrics.jsonl", "runs/sft/config.yaml", "runs/sft/policy", "runs/sft/report", "runs/sft/earlier"),
)
def _(bench):
    flush = files._flush

    def full(path):
        if "step-" in str(path):
            raise OSError(28, "No space left on device")
        flush(path)

    bench.patch.setattr(files, "_flush", full)
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


@fault("a checkpoint with a lying header", f"{TWO}: the checkpoint is damaged: weights", f"--resume {ONE}")
def _(bench):
    lying(TWO / "weights.safetensors")
    return bench.cli("train", "sft.yaml", "training.steps=3", "--resume", str(TWO))


@fault("no whole checkpoint is left", "state.json cannot be read", "the run starts anew")
def _(bench):
    shutil.rmtree(ONE)
    (TWO / "state.json").write_text("{")
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("a key changed on resuming", "seed: 0 -> 1; training.batch: 2 -> 4", "put these keys back")
def _(bench):
    return bench.cli("train", "sft.yaml", "training.steps=3", "seed=1", "training.batch=4")


@fault("clips changed on resuming", "data (videos and labels)", "train in another run folder")
def _(bench):
    bench.rows(lambda rows: rows.pop())
    return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("prompts changed on resuming", "data.prompts.train (content)", "bring back what lay at data.prompts.train,")
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


@fault("resuming from nothing", "nowhere: there is no checkpoint to resume from", "give a step-N or a run folder")
def _(bench):
    return bench.cli("train", "sft.yaml", "--resume", "nowhere")


@fault("resuming behind newer checkpoints", "step-000002 is newer", "a folder of its own")
def _(bench):
    return bench.cli("train", "sft.yaml", "--resume", str(ONE))


@fault("one checkpoint for several stages", "--resume: one checkpoint for 2 stages", "prfl train prfl.yaml --resume")
def _(bench):
    return bench.cli("train", "story.yaml", "--resume", str(ONE))
