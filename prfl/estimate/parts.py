"""A part of the estimate, and the tensors of a run's own shapes that it is measured with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from prfl.backbone import Backbone, Condition
from prfl.backbone.condition import stand_in
from prfl.backbone.network import all_predictors, base_weights, blocks_of_each, predictors
from prfl.backbone.turns import aligned, chunks, weights_of
from prfl.config.schema import Config
from prfl.estimate.stored_latents import all_plans
from prfl.estimate.work import Work
from prfl.factory.backbone import device_kind
from prfl.factory.experts import one_resident
from prfl.factory.prompts import load_prompts
from prfl.rollout.plan import StepPlan
from prfl.utils.errors import error_location

Role = Literal["rollout", "gradient", "reward", "decoder"]


@dataclass(frozen=True)
class Part:
    """Bytes of one thing.  saved: how many of them autograd keeps for the backward pass (of a phase).  alone: a phase
    before the training, with all there is by then: what is fixed is not alive yet.

    work: of one sample in this phase.  role: which calls it stands for, in the count of network evaluations."""

    name: str
    bytes: int
    saved: int = 0
    alone: bool = False
    work: Work = field(default_factory=Work)
    role: Role | None = None


def offloads(config: Config) -> bool:
    """Return whether anything leaves the device: on a CPU, host memory is the same memory."""
    return config.backbone.offload and device_kind(config) == "cuda"


def parks_vae(config: Config) -> bool:
    """Return whether the VAE leaves the device between cache and evaluation: a pixel reward decodes in every step."""
    return device_kind(config) == "cuda" and not (config.reward and config.reward.decodes)


def pinned(size: int) -> int:
    """Return the pinned memory for so many bytes: torch takes it in powers of two."""
    return 1 << (size - 1).bit_length()


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def base_bytes(config: Config, model: Backbone) -> int:
    """Return the bytes of the base's weights on the device: of two experts that take turns one's blocks alone."""
    every = sum(sum_bytes(base_weights(network)) for network in predictors(model).values())
    if not one_resident(config) or device_kind(config) == "cpu":  # whose host memory is the same memory
        return every + (max(blocks_bytes(model)) if one_resident(config) else 0)
    return every - sum(blocks_bytes(model)) + max(blocks_bytes(model))


def blocks_bytes(model: Backbone) -> list[int]:
    """Return the bytes of each network's weights that take turns."""
    return [sum_bytes(weights_of(blocks).values()) for blocks in blocks_of_each(model).values()]


def waiting_bytes(config: Config, model: Backbone) -> int:
    """Return the pinned memory of the weights that wait on the host."""
    if not one_resident(config) or device_kind(config) == "cpu":
        return 0
    total = 0
    for blocks in blocks_of_each(model).values():
        sizes = [sum_bytes([weight]) for weight in weights_of(blocks).values()]
        total += sum(pinned(sum(aligned(sizes[number]) for number in group)) for group in chunks(sizes))
    return total


def predictor_bytes(config: Config, model: Backbone) -> int:
    """Return the bytes of what predicts, copies and adapters too, on the device."""
    bases = sum(sum_bytes(base_weights(network)) for network in predictors(model).values())
    return sum(map(module_bytes, all_predictors(model))) - bases + base_bytes(config, model)


def module_bytes(module: nn.Module) -> int:
    return sum_bytes([*module.parameters(), *module.buffers()])


class Shapes:
    """Tensors of a run's shapes, on ``meta``, and the plans of its steps."""

    def __init__(self, model: Backbone, config: Config) -> None:
        self.model = model
        self.config = config
        self.clip = config.data.frames, config.data.height, config.data.width
        with error_location("data"):
            self.latent = model.latent_shape(*self.clip)
        self.tokens = min(longest_prompt(config), model.facts.text_tokens)

    @cached_property
    def plans(self) -> list[StepPlan]:
        """What each step of a run that follows a reward differentiates: thousands of draws, so they are made once."""
        return all_plans(self.config, self.model)

    def latents(self, batch: int) -> Tensor:
        return torch.empty(batch, *self.latent, device="meta")

    def pixels(self, batch: int) -> Tensor:
        return torch.empty(batch, 3, *self.clip, device="meta")

    def condition(self, batch: int) -> Condition:
        return stand_in(
            self.model.facts.condition, batch, self.tokens, self.latent, partial(torch.empty, device="meta")
        )


def longest_prompt(config: Config) -> int:
    """Return the longest prompt in tokens, or more: a text has no more tokens than bytes, and an end."""
    splits = load_prompts(config.data).values()
    return max(len(prompt.encode()) + 1 for prompts in splits for prompt in prompts)
