"""How the Qwen-VL models look at videos: patches as their own video processors cut them, but differentiable.

A patch is a cube of ``step`` frames x ``patch`` x ``patch`` pixels, in the order in which the vision tower merges
``merge`` x ``merge`` of them into one token of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from prfl.reward.look import CLIP_MEAN, CLIP_STD, soft_clamp

# Normalisations of pixels in [0, 1]: Qwen2-VL and Qwen2.5-VL take CLIP's, Qwen3-VL one half throughout.
NORMALISATIONS = {"qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}


@dataclass(frozen=True)
class QwenLook:
    """patch, merge, step: of the model.

    most_pixels, fewest_pixels: a larger frame is made smaller, a smaller one larger, its sides nearly in proportion.
    Sides become multiples of patch * merge, the number of frames one of step.
    """

    patch: int
    merge: int = 2
    step: int = 2
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    most_pixels: int = 200_704
    fewest_pixels: int = 1

    @staticmethod
    def of(config: Any, most_pixels: int) -> QwenLook:
        """Read a look from a Qwen-VL's config."""
        vision = config.vision_config
        mean, std = NORMALISATIONS.get(config.model_type, (CLIP_MEAN, CLIP_STD))
        return QwenLook(
            vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, mean, std, most_pixels
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that frames of this size are brought to."""
        factor = self.patch * self.merge
        return smart_resize(
            height, width, factor, min_pixels=max(self.fewest_pixels, factor**2), max_pixels=self.most_pixels
        )

    def tokens(self, height: int, width: int) -> int:
        """Count the tokens that the language model reads of ``step`` frames."""
        rows, columns = self.size(height, width)
        return rows * columns // (self.patch * self.merge) ** 2

    def seen(self, pixels: Float[Tensor, "b 3 f h w"]) -> tuple[Float[Tensor, "n d"], Int[Tensor, "b 3"]]:
        """Prepare videos, about [-1, 1], for the vision tower: clamp, resize, clamp, normalise, cut into patches.

        Returns the patches of all videos behind each other, and each video's grid of patches (time, height, width).
        A last group of frames that is not full is filled with the last frame, as the processors do.
        """
        videos = pixels.transpose(1, 2)
        if lacking := -videos.shape[1] % self.step:
            videos = torch.cat([videos, videos[:, -1:].expand(-1, lacking, -1, -1, -1)], dim=1)

        # In float32 at least: bicubic weights in bfloat16 shift the picture.
        batch, frames = videos.shape[:2]
        unit = soft_clamp(videos.flatten(0, 1).to(torch.promote_types(videos.dtype, torch.float32)) / 2 + 0.5)
        size = self.size(*unit.shape[2:])
        if size != tuple(unit.shape[2:]):
            unit = soft_clamp(F.interpolate(unit, size, mode="bicubic", antialias=True, align_corners=False))
        mean, std = (torch.tensor(values).to(unit).view(3, 1, 1) for values in (self.mean, self.std))
        return patchify(((unit - mean) / std).unflatten(0, (batch, frames)), self.patch, self.merge, self.step)


def patchify(
    frames: Float[Tensor, "b f c h w"], patch: int, merge: int = 2, step: int = 2
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "b 3"]]:
    """Cut videos into patches (b * t * rows * columns, c * step * patch * patch); returns them and the grids (b, 3).

    f is a multiple of step, h and w of patch * merge.  Neighbours that the tower merges lie behind each other.
    """
    batch, count, channels, height, width = frames.shape
    time, rows, columns = count // step, height // patch, width // patch
    cut = frames.reshape(
        batch, time, step, channels, rows // merge, merge, patch, columns // merge, merge, patch
    )  # fmt: skip
    patches = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * time * rows * columns, -1)
    return patches, torch.tensor([[time, rows, columns]] * batch, device=frames.device)
