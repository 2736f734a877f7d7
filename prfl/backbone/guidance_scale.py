"""How strong guidance is: one number, or one of each of two experts, or one that changes from frame to frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl.backbone.base import Facts
from prfl.backbone.experts import is_high


@dataclass(frozen=True)
class ScaleOfExperts:
    """A scale of guidance for each of two experts."""

    high: float
    low: float


@dataclass(frozen=True)
class ScaleOfFrames:
    """A scale of guidance that goes evenly from the first latent frame to the last."""

    first_frame: float
    last_frame: float

    def along(self, latents: Tensor) -> Tensor:
        """Of each frame of latents (b, c, t, h, w): (t, 1, 1)."""
        scales = torch.linspace(self.first_frame, self.last_frame, latents.shape[2])
        return scales.to(latents)[:, None, None]


Scale = float | ScaleOfExperts | ScaleOfFrames


def read_scale(saved: float | Mapping[str, float]) -> Scale:
    """A scale as ``asdict`` gives it and JSON holds it."""
    if not isinstance(saved, Mapping):
        return saved
    return ScaleOfExperts(**saved) if "high" in saved else ScaleOfFrames(**saved)


def scale_at(facts: Facts, scale: Scale) -> float | Callable[[Tensor, Tensor], float | Tensor]:
    """The scale of guidance as ``guided_network`` takes it: a number, or what it is at latents and a noise level."""
    if isinstance(scale, ScaleOfFrames):
        return lambda latents, sigma: scale.along(latents)
    if not isinstance(scale, ScaleOfExperts):
        return scale
    high, low = scale.high, scale.low
    return high if high == low else lambda latents, sigma: high if bool(is_high(facts, sigma)) else low


def branches_at(facts: Facts, scale: Scale, sigma: float) -> int:
    """The network calls of a guided evaluation: one where the scale is 1, as it may be of one of two experts."""
    if isinstance(scale, ScaleOfExperts):
        scale = scale.high if bool(is_high(facts, torch.tensor(sigma))) else scale.low
    return 1 if scale == 1 else 2
