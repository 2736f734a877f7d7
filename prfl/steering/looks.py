"""Rewards as steering reads them: a latent one at noisy latents, any other at the decoded clean prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.scores import Shape, total
from prfl.steering.process import Look
from prfl.utils import rng


def latent_look(
    reward: LatentReward | RewardEnsemble,
    weights: Mapping[str, float] | None = None,
    aggregate: Shape = "sum",
    weight: float = 1.0,
) -> Look:
    """Read a latent reward: it costs the share of the network's blocks that it runs, once for each adapter."""

    def read(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        scores = (reward if aggregate == "sum" else reward.logits)(latents, sigma, condition)
        return total(scores, counted(reward.dimensions, weights), aggregate)

    passes = reward.passes if isinstance(reward, RewardEnsemble) else [[reward]]
    deepest = [max(block for member in members for block in member.blocks) + 1 for members in passes]
    return Look(read, weight=weight, calls=sum(deepest) / reward.backbone.facts.num_blocks, held=reward.selected)


def pixel_look(
    reward: PixelReward | PublicReward,
    backbone: Backbone,
    weights: Mapping[str, float] | None = None,
    aggregate: Shape = "sum",
    weight: float = 1.0,
) -> Look:
    """Read a pixel reward at the decoded clean prediction.  Its own network is not counted, only the decoding."""

    def read(clean: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        scores = (reward if aggregate == "sum" else reward.logits)(backbone.decode(clean), condition)
        return total(scores, counted(reward.dimensions, weights), aggregate)

    return Look(read, clean=True, weight=weight, decodes=1)


def callable_look(
    score: Callable[[Float[Tensor, "n 3 f h w"], list[str]], Tensor], backbone: Backbone, weight: float = 1.0
) -> Look:
    """Read any function of decoded pixels in [-1, 1] and prompts that gives a number for each video."""

    def read(clean: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        pixels = backbone.decode(clean).float().clamp(-1, 1)
        return score(pixels, [ask.prompt for ask in condition.asks])

    return Look(read, clean=True, weight=weight, decodes=1)


def random_look(seed: int) -> Look:
    """A choice by chance, for comparison: it costs nothing and reads nothing."""
    count = iter(range(2**31))

    def read(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        return torch.cat([rng.uniform(seed, f"random/{ask.prompt}", next(count), [0]) for ask in condition.asks])

    return Look(read)


def counted(dimensions: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights, or 1 for each of the reward's dimensions (an ensemble's uncertainty is none of them)."""
    return dict(weights) if weights else dict.fromkeys(dimensions, 1.0)
