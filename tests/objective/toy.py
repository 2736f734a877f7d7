"""A float64 toy in place of a backbone and a reward, for comparing whole objectives with plain autograd."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from prfl.backbone import Condition
from prfl.backbone.checkpointing import Running
from prfl.backbone.condition import as_asks
from prfl.backbone.frames import detach_others
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.base import Method
from prfl.objective.reward_gradient import RewardGradient
from prfl_kernels.lora_linear import dropped
from tests.objective.parts import PROMPTS, clips
from tests.toy_facts import NoText, toy_facts


class ToyBackbone:
    """A network of three numbers a sample that depends on latents, sigma and condition.

    It has one set of weights, which every adapter's name selects, and implements the protocol without inheriting.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        shapes = {"w1": (5, 3), "w2": (3, 5), "u": (5,), "v": (5, 2), "g": (3,)}
        self.weights = {name: nn.Parameter(torch.randn(*shape).double()) for name, shape in shapes.items()}
        self.embeds = {prompt: torch.randn(1, 1, 2).double()[:, 0] for prompt in PROMPTS}
        self.facts, self.running, self.text = toy_facts(), Running(), NoText()
        self.networks: dict[str, nn.Module] = {}
        self.calls = 0
        self.dropout, self.seeds = 0.0, None

    def latent_shape(self, frames, height, width):
        return (3, frames, height, width)

    def sigmas(self, steps, shape, shift=None):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def condition(self, asks):
        asks = as_asks(asks)
        known = [self.embeds.get(ask.prompt, torch.zeros(1, 2).double()) for ask in asks]
        return Condition({"text": torch.cat(known)}, asks)

    def start(self, noise, condition, sigma):
        return noise

    def velocity(self, latents, sigma, condition):
        self.calls += 1
        own, x = self.weights, latents.flatten(1)
        hidden = torch.tanh(x @ own["w1"].T + sigma * own["u"] + condition.tensors["text"] @ own["v"].T)
        if self.dropout and self.seeds is not None:
            hidden = dropped(hidden, self.seeds, self.dropout)
        return (hidden @ own["w2"].T + own["g"] * sigma * x).reshape(latents.shape)

    def features(self, latents, sigma, condition, blocks):
        return [latents.flatten(2).transpose(1, 2) for _ in blocks]

    def encode(self, pixels):
        return pixels.double()

    def decode(self, latents, shown=None):
        return latents if shown is None else detach_others(latents, shown)[:, :, list(shown)]

    def add_adapter(self, name, spec):
        pass

    @contextmanager
    def adapter(self, name, dropout=None):
        before = self.seeds
        self.seeds = before if dropout is None else dropout
        yield
        self.seeds = before

    def parameters(self, name):
        return self.weights


@dataclass
class ToyScorer:
    noise_aware: bool = True
    differentiable = True

    def selected(self):
        return nullcontext()

    def __call__(self, latents, sigma, condition, step):
        x = latents.flatten(1)
        mixed = torch.sin(2 * x + sigma[:, None]).sum(1) + (1 - sigma) * x.square().sum(1)
        return {"motion": mixed + condition.tensors["text"][:, 0] * x[:, 0]}


class InDouble(RewardGradient):
    def draw(self, step, indices):
        prompts, condition, start = super().draw(step, indices)
        return prompts, condition, start.double()


LOSS = RewardLoss({"motion": 1.0}, shape="linear", scale=0.7)


def toy_objective(method: Method, **more) -> RewardGradient:
    backbone = ToyBackbone()
    data = clips((3, 1, 1, 1), {prompt: backbone.condition([prompt]) for prompt in PROMPTS})
    return InDouble(backbone, method, ToyScorer(), LOSS, PROMPTS, (3, 1, 1, 1), distance_every=0, clips=data, **more)
