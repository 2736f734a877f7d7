"""Supervised fine-tuning: flow matching on cached latents.  A method by itself, and a regulariser of PRFL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.condition import Condition
from prfl.data.dataset import LatentDataset
from prfl.rollout.flow import add_noise, shift_sigmas, velocity_target
from prfl.utils import rng
from prfl.utils.order import shuffled, shuffled_alike
from prfl.utils.schedule import unshifted
from prfl.utils.timing import Clock


@dataclass(frozen=True)
class SftBatch:
    """A batch of clips and what was drawn for each.

    clean, noise: (b, c, t, h, w).  sigma: (b,).  dropped: the samples whose prompt was dropped; their condition is
    that of the empty prompt.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Condition
    prompts: list[str]
    dropped: list[bool]


@dataclass
class Sft:
    """Minimise scale * mean of (v(x_sigma, sigma, condition) - (noise - x0))^2, sigma = shift(u), u ~ U[0, 1).

    within: the lowest and the highest noise level that is drawn; between them the distribution keeps its shape.
    adapter: the adapter that is trained.  None is full fine-tuning: every weight of the transformer that requires a
    gradient.
    prompt_dropout: probability that a prompt is replaced by the empty one, so that guidance keeps working.
    """

    backbone: Backbone
    dataset: LatentDataset
    seed: int
    adapter: str | None = "policy"
    prompt_dropout: float = 0.1
    shift: float = 1.0
    scale: float = 1.0
    within: tuple[float, float] = (0.0, 1.0)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.backbone.parameters(self.adapter)

    def order(self, indices: Sequence[int]) -> list[int]:
        """Return the data rows of these sample indices; all rows of one step have latents of one shape."""
        if kinds := self.dataset.kinds(self.dataset.video):
            return shuffled_alike(indices, kinds, self.dataset.batch, self.seed, "sft")
        return shuffled(indices, len(self.dataset), self.seed, "sft")

    def draw(self, step: int, indices: Sequence[int]) -> SftBatch:
        device = self.backbone.facts.device
        batch = self.dataset.get(self.order(indices))
        clean = batch.latents.to(device, torch.float32)
        noise = rng.normal(clean.shape[1:], self.seed, "sft/noise", step, indices).to(clean)
        first, last = (unshifted(end, self.shift) for end in self.within)
        u = first + (last - first) * rng.uniform(self.seed, "sft/sigma", step, indices)
        dropped = (rng.uniform(self.seed, "sft/dropout", step, indices) < self.prompt_dropout).tolist()
        condition = drop_prompts(batch.condition.to(device), self.dataset.unconditional(batch.condition), dropped)
        return SftBatch(clean, noise, shift_sigmas(u, self.shift).to(clean), condition, batch.prompts, dropped)

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        clock = Clock(self.backbone.facts.device)
        with clock("data"):
            batch = self.draw(step, indices)
        dropout = rng.seeds(self.seed, "dropout/sft", step, indices).to(self.backbone.facts.device)
        with self.backbone.adapter(self.adapter, dropout):
            with clock("forward"):
                noisy = add_noise(batch.clean, batch.noise, batch.sigma)
                velocity = self.backbone.velocity(noisy, batch.sigma, batch.condition)
                loss = (velocity.float() - velocity_target(batch.clean, batch.noise)).square().mean()
            with clock("backward"):
                (self.scale * loss).backward()
        return {"loss": float(loss.detach())} | clock.metrics()

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the batch as it was drawn, for a person who wants to know why it failed."""
        batch = self.draw(step, indices)
        tensors = {"clean": batch.clean, "noise": batch.noise, "sigma": batch.sigma}
        return tensors, {"prompts": batch.prompts, "dropped": batch.dropped}


def drop_prompts(condition: Condition, empty: Condition, dropped: Sequence[bool]) -> Condition:
    """Return ``condition`` with each dropped sample replaced by its unconditional one, from ``empty``."""
    count = len(condition)
    return Condition.cat([condition, empty])[[i + count * drop for i, drop in enumerate(dropped)]]
