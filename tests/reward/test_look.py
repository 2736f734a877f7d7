"""Every public reward's look beside its model's own image processor, and the fits that have none beside Pillow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from prfl.reward.look import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Look, evenly_spaced, frames_of, seen
from tests.reward.test_aesthetic import SIZE, pictures, smooth
from tests.reward.tiny_rewards import all_rewards

SIZES = [(40, 56), (30, 72), (28, 28), (20, 24), (151, 71)]


def cut(size: int, short: int | None = None, **normalisation: Any) -> dict[str, Any]:
    return {
        "size": {"shortest_edge": short or size}, "crop_size": {"height": size, "width": size}, **normalisation,
    }  # fmt: skip


def by_clip(frames: list[Image.Image]) -> Any:
    return CLIPImageProcessorPil(**cut(SIZE))(frames, return_tensors="pt")["pixel_values"]


def by_yolos(frames: list[Image.Image]) -> Any:
    """Sizes as published: the long side is at most 1333."""
    size = {"shortest_edge": 32, "longest_edge": 1333}
    return YolosImageProcessorPil(size=size)(frames, return_tensors="pt")["pixel_values"]


def by_videomae(frames: list[Image.Image]) -> Any:
    """The published model's normalisation is ImageNet's, not the class's own default."""
    settings = cut(16, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    return VideoMAEImageProcessorPil(**settings)([frames], return_tensors="pt")["pixel_values"][0]


def by_vjepa(frames: list[Image.Image]) -> Any:
    """V-JEPA 2's own needs torchvision; its sizes and normalisation, on the same steps of VideoMAE's."""
    source = Path(transformers.__file__).parent / "models/vjepa2/video_processing_vjepa2.py"
    assert "resize_size = int(crop_size * 256 / 224)" in source.read_text(encoding="utf-8")
    settings = cut(16, 18, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    return VideoMAEImageProcessorPil(**settings)([frames], return_tensors="pt")["pixel_values"][0]


BY_PROCESSOR: dict[str, Callable[[list[Image.Image]], Any]] = {
    **dict.fromkeys(("clip", "pickscore", "imagereward", "mps"), by_clip),
    "object": by_yolos, "action": by_videomae, "coherence": by_vjepa,
}  # fmt: skip


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", BY_PROCESSOR)
def test_look_is_that_of_the_models_own_processor(name: str, height: int, width: int) -> None:
    """To 2 levels of 255: the path in 8 bits rounds between its passes."""
    pixels, look = smooth(1, 2, height, width), all_rewards()[name]().look
    expected = torch.as_tensor(np.stack([np.asarray(frame) for frame in BY_PROCESSOR[name](pictures(pixels))]))
    torch.testing.assert_close(seen(frames_of(pixels), look), expected, rtol=0, atol=2 / 255 / min(look.std))


@pytest.mark.parametrize("height, width", [(40, 56), (56, 40), (7, 9), (151, 101)])
@pytest.mark.parametrize("name", ["videoalign", "hpsv3"])
def test_patches_are_those_of_qwens_own_processor(name: str, height: int, width: int) -> None:
    """Of single pictures, which it doubles: too small ones are made larger, too large ones smaller."""
    pixels, look = smooth(1, 1, height, width), all_rewards()[name]().look
    sizes = {"shortest_edge": look.fewest_pixels, "longest_edge": look.most_pixels}
    shape = {"patch_size": look.patch, "merge_size": look.merge, "temporal_patch_size": look.step}
    theirs = Qwen2VLImageProcessorPil(size=sizes, **shape)(pictures(pixels), return_tensors="pt")
    values, grid = look.seen(pixels)
    assert torch.equal(grid, torch.as_tensor(theirs["image_grid_thw"]))
    expected = torch.as_tensor(theirs["pixel_values"])
    torch.testing.assert_close(values, expected, rtol=0, atol=2 / 255 / min(look.std))


@pytest.mark.parametrize("height, width", SIZES)
def test_pad_is_the_whole_picture_on_black(height: int, width: int) -> None:
    """HPS's own preparation, with Pillow: long side to the size, black around, normalised."""
    noise = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.7
    scale = SIZE / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    expected = torch.zeros(1, 3, SIZE, SIZE)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    for channel in range(3):
        picture = Image.fromarray((noise[0, channel] / 2 + 0.5).numpy())
        resized = np.array(picture.resize((columns, rows), Image.Resampling.BICUBIC)).clip(0, 1)
        expected[0, channel, top : top + rows, left : left + columns] = torch.from_numpy(resized)
    expected = (expected - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    look = all_rewards()["hps"]().look
    assert look == Look(SIZE, "pad")
    torch.testing.assert_close(seen(noise, look), expected, rtol=0, atol=2e-5)


def test_a_detector_sees_a_whole_wide_video() -> None:
    """480 x 832 at YOLOS-base's 800: the long side is the limit, and the proportions stay."""
    assert Look(800, "whole").resized(480, 832) == (768, 1328)
    assert Look(800, "whole").resized(832, 480) == (1328, 768)
    assert Look(512, "whole").resized(480, 832) == (512, 880)


def test_frames_are_evenly_spaced() -> None:
    assert evenly_spaced(17, 5) == [0, 4, 8, 12, 16]
    assert evenly_spaced(2, 4) == [0, 0, 1, 1]
