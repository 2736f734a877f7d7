"""Adapters and gradients that cannot learn."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from prfl.backbone import adapters, load_backbone
from prfl.config.sections.training import TrainingConfig
from prfl.objective.methods.prfl import Prfl
from prfl.objective.sft import Sft
from prfl.reward import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from prfl.training.distributed import make_accelerator
from prfl.training.loop import fit
from prfl.training.run_folder import RunFolder
from tests.faults.planting import fault
from tests.objective.parts import pixel_objective, with_policy
from tests.objective.test_sft import dataset


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
    for parameter in backbone.parameters("policy").values():
        parameter.requires_grad_(False)
    objective = Sft(backbone, dataset(backbone), seed=0)
    run = RunFolder(Path("runs/new"))
    settings = TrainingConfig(steps=1, batch=1, learning_rate=1e-3)
    return bench.call(fit, objective, settings, run, accelerator=make_accelerator(run, "cpu", []))


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


@fault("adapter blocks that do not exist", "sft.yaml: backbone.adapter.blocks", "[9]", "3 blocks", "some of 0 to 2")
def _(bench):
    return bench.cli("train", "sft.yaml", "backbone.adapter.blocks=[9]")
