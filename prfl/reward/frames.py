"""Which latent frames a pixel reward reads in a step, and their pixels through the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.frames import pixel_times
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
    """Return pixels of the chosen latent frames, and their times in [0, 1] of the whole clip."""
    times = pixel_times(chosen, latents.shape[2], backbone.facts.temporal_factor)
    return backbone.decode(latents, chosen), times.to(latents.device)
