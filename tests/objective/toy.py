"""A float64 toy in place of a backbone and a reward, for comparing whole objectives with plain autograd."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from prfl.backbone import Backbone, Condition
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.base import Method
from prfl.objective.reward_gradient import RewardGradient
from prfl_kernels.lora_linear import dropped
from tests.objective.parts import PROMPTS, clips


class ToyBackbone(Backbone):
    """A network of three numbers a sample that depends on latents, sigma and condition, with no adapter to select."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = {"w1": (5, 3), "w2": (3, 5), "u": (5,), "v": (5, 2), "g": (3,)}
        self.weights = {name: nn.Parameter(torch.randn(*shape).double()) for name, shape in shapes.items()}
        self.embeds = {prompt: torch.randn(1, 1, 2).double() for prompt in PROMPTS}
        self.checkpointing, self.offload = "none", False
        self.calls = 0
        self.dropout, self.seeds = 0.0, None

    device = torch.device("cpu")  # type: ignore[assignment]

    def remember(self, prompts, progress=iter):
        pass

    def condition(self, prompts):
        return Condition.cat([Condition(self.embeds[prompt], torch.ones(1, dtype=torch.long)) for prompt in prompts])

    def adapter(self, name):
        return nullcontext()

    @contextmanager
    def dropping(self, name, seeds):
        before, self.seeds = self.seeds, seeds
        yield
        self.seeds = before

    def adapter_parameters(self, name):
        return self.weights

    def velocity(self, latents, sigma, condition):
        self.calls += 1
        own, x = self.weights, latents.flatten(1)
        hidden = torch.tanh(x @ own["w1"].T + sigma * own["u"] + condition.prompt_embeds[:, 0] @ own["v"].T)
        if self.dropout and self.seeds is not None:
            hidden = dropped(hidden, self.seeds, self.dropout)
        return (hidden @ own["w2"].T + own["g"] * sigma * x).reshape(latents.shape)


@dataclass
class ToyScorer:
    noise_aware: bool = True
    differentiable = True

    def selected(self):
        return nullcontext()

    def __call__(self, latents, sigma, condition, step):
        x = latents.flatten(1)
        mixed = torch.sin(2 * x + sigma[:, None]).sum(1) + (1 - sigma) * x.square().sum(1)
        return {"motion": mixed + condition.prompt_embeds[:, 0, 0] * x[:, 0]}


class InDouble(RewardGradient):
    def draw(self, step, indices):
        prompts, condition, start = super().draw(step, indices)
        return prompts, condition, start.double()


LOSS = RewardLoss({"motion": 1.0}, shape="linear", scale=0.7)


def toy_objective(method: Method, **more) -> RewardGradient:
    backbone = ToyBackbone()
    data = clips((3, 1, 1, 1), {prompt: backbone.condition([prompt]) for prompt in PROMPTS})
    return InDouble(backbone, method, ToyScorer(), LOSS, PROMPTS, (3, 1, 1, 1), distance_every=0, clips=data, **more)
