"""Which latent frames a pixel reward reads in a step, and their pixels through the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.utils import rng

Frames = Literal["all", "one"] | int


def draw_frames(count: int, frames: Frames, seed: int, step: int) -> list[int]:
    """Return sorted indices of the latent frames that are decoded in this step: one of each of so many equal parts."""
    number = count if frames == "all" else 1 if frames == "one" else min(frames, count)
    bounds = [count * part // number for part in range(number + 1)]
    drawn = []
    for part, (low, high) in enumerate(pairwise(bounds)):
        drawn.append(low + rng.integer(high - low, seed, "frames", step, part))
    return drawn


def decode_frames(
    backbone: Backbone, latents: Float[Tensor, "b c t h w"], chosen: Sequence[int]
) -> tuple[Float[Tensor, "b 3 f H W"], Float[Tensor, " f"]]:
    """Return pixels of the chosen latent frames, and their times in [0, 1] of the whole clip.

    Latent frame 0 is one pixel frame, every other one ``temporal_factor`` of them.
    """
    count, factor = latents.shape[2], backbone.temporal_factor

    # The frames between are decoded too, because the decoder is causal, and get no gradient.
    with_gradient = torch.zeros(count, 1, 1, dtype=torch.bool, device=latents.device)
    with_gradient[list(chosen)] = True
    mixed = torch.where(with_gradient, latents, latents.detach())[:, :, : chosen[-1] + 1]

    # The pixel frames that the chosen latent frames stand for.
    shown: list[int] = []
    for t in chosen:
        shown += [0] if t == 0 else range((t - 1) * factor + 1, t * factor + 1)
    last = max(1, (count - 1) * factor)
    times = torch.tensor(shown, device=latents.device, dtype=torch.float32) / last
    return backbone.decode(mixed, gradient_from=chosen[0])[:, :, shown], times
