"""How the networks of public rewards look at pictures: size, fit, normalisation; and a few frames at a time.

Each look is that of the network's own image processor, in floating point and differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.yolos.image_processing_pil_yolos import get_size_with_aspect_ratio_yolos

# CLIP's and ImageNet's own normalisations of pixels in [0, 1], by channel.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Frames that a network reads at once; with gradients, its activations are alive for these only (CLIP ViT-L/14: 0.4 GB
# a frame in float32).
FRAMES_AT_ONCE = 4
LONGEST = 1333  # pixels of the long side that detectors are trained with


@dataclass(frozen=True)
class Look:
    """size: of the square that the network reads.

    fit: ``square`` squeezes a picture into it, ``crop`` brings its short side to the size and cuts the middle out,
    ``pad`` brings its long side to the size and lays it on black; ``whole`` is for a network that reads any size: it
    brings the short side to the size, but the long one to no more than ``LONGEST``, and both to multiples of 16.
    mode: of the antialiased resizing.  short: the short side before the middle is cut out; None is the size.
    """

    size: int
    fit: Literal["square", "crop", "pad", "whole"] = "square"
    mode: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    short: int | None = None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after resizing, before cutting or padding."""
        if self.fit == "square":
            return self.size, self.size
        if self.fit == "whole":
            return get_size_with_aspect_ratio_yolos((height, width), self.size, LONGEST)
        if self.fit == "crop":  # as transformers' image processors round
            scale = (self.short or self.size) / min(height, width)
            return int(height * scale + 1e-9), int(width * scale + 1e-9)
        scale = self.size / max(height, width)  # as HPS v2's own preparation rounds
        return round(height * scale), round(width * scale)


def soft_clamp(unit: Tensor) -> Tensor:
    """Clamp to [0, 1] in the value only: the gradient passes through, or saturated pixels would never get one."""
    return unit + (unit.clamp(0, 1) - unit).detach()


def seen(frames: Float[Tensor, "n 3 h w"], look: Look) -> Float[Tensor, "n 3 rows columns"]:
    """Prepare pictures, about [-1, 1], for a network: clamp, resize, fit, clamp what bicubic overshoots, normalise."""
    unit = soft_clamp(frames / 2 + 0.5)
    size = look.resized(*frames.shape[2:])
    unit = F.interpolate(unit, size, mode=look.mode, antialias=True, align_corners=False)
    if look.mode == "bicubic":
        unit = soft_clamp(unit)

    if look.fit == "crop":
        top, left = (size[0] - look.size) // 2, (size[1] - look.size) // 2
        unit = unit[..., top : top + look.size, left : left + look.size]
    elif look.fit == "pad":
        rows, columns = look.size - size[0], look.size - size[1]
        unit = F.pad(unit, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    mean, std = (torch.tensor(values).to(unit).view(3, 1, 1) for values in (look.mean, look.std))
    return (unit - mean) / std


def frames_of(pixels: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "n 3 h w"]:
    """Lay the frames of all videos behind each other, n = b * f."""
    return pixels.transpose(1, 2).flatten(0, 1)


def each_frame(
    score: Callable[..., Float[Tensor, "n ..."]], *inputs: Tensor, frames_at_once: int = FRAMES_AT_ONCE
) -> Float[Tensor, "n ..."]:
    """Return ``score`` of all frames, a few at a time; where gradients flow, computed again in the backward pass.

    inputs: each (n, ...), the frames first.
    """
    chunks = zip(*(values.split(frames_at_once) for values in inputs), strict=True)
    return torch.cat([computed_again(score, *chunk) for chunk in chunks])


def computed_again(compute: Callable[..., Any], *inputs: Tensor) -> Any:
    """Call ``compute``; where gradients flow its activations are freed, and computed again in the backward pass."""
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
    return compute(*inputs)


def evenly_spaced(frames: int, count: int) -> list[int]:
    """Return ``count``, two or more, of so many frames, from first to last; some twice where there are fewer."""
    return [round(index * (frames - 1) / (count - 1)) for index in range(count)]
