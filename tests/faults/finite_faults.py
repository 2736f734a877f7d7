"""Numbers that are not finite: losses, gradients, latents, rewards, weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from prfl.backbone import load_backbone
from prfl.backbone.wan.model import WanBackbone
from prfl.data.dataset import load_dataset
from prfl.objective.sft import Sft
from prfl.reward import LatentReward
from prfl.training import guards
from prfl.utils.video_size import VideoSize
from tests.faults.entry_faults import rewritten
from tests.faults.planting import fault
from tests.faults.project import CLIP
from tests.objective.parts import with_policy


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
    logits = LatentReward.logits
    bench.patch.setattr(
        LatentReward, "logits", lambda *args: {name: math.nan * value for name, value in logits(*args).items()}
    )
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


@fault("a cached clip that is not finite", "its latents are not finite", "run `prfl cache`")
def _(bench):
    rewritten("latents", lambda tensors: tensors["latents"].fill_(math.inf))
    return bench.call(load_dataset, load_backbone(bench.model), "manifest.jsonl", "cache", VideoSize(**CLIP))


@fault("processes with different weights", "process 0 and process 1", "resume all of them from the same checkpoint")
def _(bench):
    backbone = with_policy(load_backbone(bench.model))
    mine = {name: value.detach().clone() for name, value in backbone.parameters("policy").items()}
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
    tensors["proj_out.weight"].fill_(3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    return bench.cli("train", "sft.yaml", "run=runs/new", "backbone.model=model")
