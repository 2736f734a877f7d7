"""The patches of the Qwen-VL models: against a plain loop, and against their own video processors where they run."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

from prfl.reward.qwen_look import QwenLook, patchify

HALF = (0.5, 0.5, 0.5)


def test_patches_are_those_of_a_plain_loop() -> None:
    """Of each video, group of frames and block of merge x merge patches: the patches of one block follow each other."""
    frames = torch.randn(2, 4, 3, 8, 16)
    patches, grid = patchify(frames, patch=2, merge=2, step=2)
    assert grid.tolist() == [[2, 4, 8]] * 2
    expected = []
    for video in frames:
        for time in range(0, 4, 2):
            for block_row in range(0, 8, 4):
                for block_column in range(0, 16, 4):
                    for row in (block_row, block_row + 2):
                        for column in (block_column, block_column + 2):
                            cube = video[time : time + 2, :, row : row + 2, column : column + 2]
                            expected.append(cube.transpose(0, 1).flatten())
    assert torch.equal(patches, torch.stack(expected))


def test_sizes_and_frames_that_patches_do_not_divide() -> None:
    look = QwenLook(patch=4, mean=HALF, std=HALF, most_pixels=1000)
    assert look.size(20, 28) == (16, 32)  # 20 / 8 = 2.5, and Python rounds to even
    assert look.size(3, 5) == (8, 16)  # one token is the least, in proportion
    rows, columns = look.size(100, 200)
    assert rows * columns <= 1000 and rows % 8 == columns % 8 == 0

    pixels = (torch.rand(2, 3, 5, 20, 28) * 0.6 - 0.3).requires_grad_()
    values, grid = look.seen(pixels)
    assert grid.tolist() == [[3, 4, 8]] * 2 and len(values) == 2 * 3 * 4 * 8
    assert look.tokens(20, 28) == 4 * 8 // 4

    # The sixth frame is the fifth again, and every frame gets gradient.
    last = values.reshape(2, 3, 4 * 8, 3, 2, 16)[:, 2]
    assert torch.equal(last[..., 0, :], last[..., 1, :])
    values.square().sum().backward()
    assert (pixels.grad.abs().amax((0, 1, 3, 4)) > 0).all()


def test_looks_are_read_from_configs() -> None:
    assert QwenLook.of(Qwen3VLConfig(), 1000).patch == 16 and QwenLook.of(Qwen3VLConfig(), 1000).mean == HALF
    assert QwenLook.of(Qwen2_5_VLConfig(), 1000).patch == 14 and QwenLook.of(Qwen2_5_VLConfig(), 1000).mean != HALF


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the video processors need torchvision")
def test_against_the_models_own_processors() -> None:  # pragma: no cover
    from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    for kind, config in ((Qwen2VLVideoProcessor, Qwen2_5_VLConfig()), (Qwen3VLVideoProcessor, Qwen3VLConfig())):
        processor = kind(cap_pixels_per_frame=True)
        video = (torch.rand(6, 3, 168, 224) * 255).round().to(torch.uint8)
        theirs = processor(videos=[video], return_tensors="pt", do_sample_frames=False, do_resize=False)
        values, grid = patchify_whole(video, QwenLook.of(config, 10**9))
        assert torch.equal(grid, theirs["video_grid_thw"])
        torch.testing.assert_close(values, theirs["pixel_values_videos"], atol=2e-2, rtol=0)


def patchify_whole(video: torch.Tensor, look: QwenLook) -> tuple[torch.Tensor, torch.Tensor]:  # pragma: no cover
    return look.seen(video[None].transpose(1, 2).float() / 127.5 - 1)
