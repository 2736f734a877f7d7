"""Many videos as one."""

from __future__ import annotations

import pytest
import torch

from prfl.evaluation.media import grid


@pytest.mark.parametrize(
    ("groups", "beside", "size"),
    [
        (1, 2, (8, 32)),
        (4, 1, (8 + 4 + 8, 16 + 4 + 16)),
        (3, 1, (8 + 4 + 8, 16 + 4 + 16)),
        (8, 2, (8 * 4 + 4 * 3, 2 * 32 + 4)),
    ],
)
def test_groups_lie_in_a_block(groups: int, beside: int, size: tuple[int, int]) -> None:
    videos = [[torch.full((3, 2, 8, 16), 0.1 + g + 0.01 * b) for b in range(beside)] for g in range(groups)]
    whole = grid(videos)
    assert whole.shape == (3, 2, *size)
    levels = set(whole.unique().tolist())
    assert levels - {0.0} == {float(video[0, 0, 0, 0]) for group in videos for video in group}


def test_a_large_grid_is_shrunk() -> None:
    videos = [[torch.ones(3, 1, 48, 80), -torch.ones(3, 1, 48, 80)]] * 6
    whole = grid(videos, longest_side=200)
    assert max(whole.shape[2:]) <= 200
    assert [float(whole[0, 0, 0, 0]), float(whole.min())] == pytest.approx([1, -1])
