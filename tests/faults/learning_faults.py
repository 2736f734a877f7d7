"""Runs that would end without an error, but learn nothing or the wrong thing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from prfl.objective.loss import RewardLoss
from prfl.objective.sft import Sft
from prfl.reward import LatentReward
from prfl.training import learning, loop
from tests.faults.planting import fault, warning

RUN = ("train", "sft.yaml", "run=runs/new")


@fault("an optimizer over copies", "the optimizer holds 0 of the objective's 48 parameters, and 48 that are not")
def _(bench):
    adamw = loop.adamw
    bench.patch.setattr(
        loop, "adamw", lambda given, **more: adamw([nn.Parameter(p.detach().clone()) for p in given], **more)
    )
    return bench.cli(*RUN)


@fault("an optimizer over half of the parameters", "holds 24 of the objective's 48", "is not among them", "no copies")
def _(bench):
    adamw = loop.adamw
    bench.patch.setattr(loop, "adamw", lambda given, **more: adamw(given[::2], **more))
    return bench.cli(*RUN)


@fault("parameters that take no gradient", "24 of the objective's 48 parameters take no gradient", "lora_B")
def _(bench):
    parameters = Sft.parameters

    def half(self):
        found = parameters(self)
        for name, parameter in found.items():
            parameter.requires_grad_("lora_A" in name)
        return found

    bench.patch.setattr(Sft, "parameters", half)
    return bench.cli(*RUN)


@fault("a rate that is lost", "training.learning_rate: up to step 1 none of the 48", "1e-30", leaves=("runs/new",))
def _(bench):
    message = bench.cli(*RUN, "training.learning_rate=1e-30")
    assert not Path("runs/new/checkpoints").exists()
    return message


@fault("an alpha that is lost", "none of the 48 trained tensors has moved", "the adapter's alpha", leaves=("runs/new",))
def _(bench):
    return bench.cli(*RUN, "backbone.adapter.alpha=1e-30")


@fault("a constant reward with noise", "has moved", "the gradient's norm", "the reward's scale", leaves=("runs/prfl",))
def _(bench):
    scores = LatentReward.__call__
    bench.patch.setattr(
        LatentReward, "__call__", lambda *given: {name: 1 + 1e-20 * (v - 1) for name, v in scores(*given).items()}
    )
    return bench.cli("train", "prfl.yaml")


@fault("an adapter that is scaled away", "backbone.adapter: after step 2 the policy's output is still its base's",
       leaves=("runs/new",))  # fmt: skip
def _(bench):
    apply = loop.apply

    def scaled_away(optimizer, rate):
        apply(optimizer, rate)
        for layer in LAYERS:
            layer.scaling = dict.fromkeys(layer.scaling, 0.0)

    LAYERS = []
    init = LoraLayer.__init__
    bench.patch.setattr(LoraLayer, "__init__", lambda self, *a, **m: (init(self, *a, **m), LAYERS.append(self))[0])
    bench.patch.setattr(loop, "apply", scaled_away)
    return bench.cli(*RUN, "training.save_every=2")


@fault("a base that drifts", "backbone.model: up to step 1", "changed that are not trained", leaves=("runs/new",))
def _(bench):
    accumulate = Sft.accumulate

    def drifting(self, step, indices):
        with torch.no_grad():
            self.backbone.transformer.blocks[1].attn1.to_q.base_layer.weight.mul_(1 + 1e-6)
        return accumulate(self, step, indices)

    bench.patch.setattr(Sft, "accumulate", drifting)
    return bench.cli(*RUN)


@fault("a hinge that is met for good", "no gradient in the 4 steps up to step 6: the loss is zero", "reward.target",
       "step-000006 is what was reached", leaves=("runs/prfl",))  # fmt: skip
def _(bench):
    call = RewardLoss.__call__
    steps = []

    def met(self, scores):
        steps.append(1)
        loss, reward = call(self, scores)
        return (loss, reward) if len(steps) <= 2 else (0 * loss, 0 * reward + self.target)

    bench.patch.setattr(RewardLoss, "__call__", met)
    bench.patch.setattr(learning, "QUIET_ENDS", 4)
    message = bench.cli("train", "prfl.yaml", "reward.shape=hinge", "reward.target=9", "training.steps=10")
    assert Path("runs/prfl/checkpoints/step-000006/state.json").exists()
    return message


@warning("a sign that is flipped", "warning: up to step 32 the loss got worse", "lower training.learning_rate (0.02)")
def _(bench):
    init = Sft.__init__
    bench.patch.setattr(Sft, "__init__", lambda self, *given, **more: init(self, *given, **{**more, "scale": -1.0}))
    return bench.warned(*RUN, "training.learning_rate=0.02", "training.save_every=32", "training.steps=32")


@warning("a rate of a thousand", "warning: the first step moved a weight by 1e+03: lower training.learning_rate")
def _(bench):
    return bench.warned(*RUN, "training.learning_rate=1e3", "training.steps=1")


@warning("a head that nobody measured", "warning: reward.path: nobody knows whether it beats chance", "light")
def _(bench):
    return bench.warned("train", "prfl.yaml", "training.steps=1")


@warning("a head at chance", "reward.path: light does not rank clearly better than chance, 0.5: 0.41 at sigma 0-0.2",
         "(60 pairs)")  # fmt: skip
def _(bench):
    path = Path("heads/latent/config.json")
    config = json.loads(path.read_text())
    del config["config_sha256"]
    accuracy = {name: {"0-0.2": value, "0.95-0.975": 0.48} for name, value in (("light", 0.41), ("calm", 0.4))}
    config["card"] |= {"accuracy": accuracy, "pairs": {"light": 60, "calm": 60}}
    path.write_text(json.dumps(config))
    found = bench.warned("train", "prfl.yaml", "training.steps=1")
    assert "calm" not in found, "it has no weight"
    assert "0.95" not in found, "there is nothing to see at such noise"
    assert "none of them is worth following yet" in found
    return found
