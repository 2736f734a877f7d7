"""The README's moving picture: what its frames show (bench/picture.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.picture import REPEATS, Drawn, pictures

STEPS, FRAMES = 3, 2
PROMPTS = ["a red circle moves left", "a blue bar moves up"]


def drawn(right: list[bool]) -> Drawn:
    pixels = [torch.zeros(2, 3, FRAMES, 8, 8) for _ in range(STEPS + 1)]
    return Drawn(pixels, [1.0, 0.6, 0.3, 0.0], [-1.0, -2.0, -1.5, -1.0], right)


def greens(picture: np.ndarray) -> int:
    """How many pixels have the colour of a right video's frame."""
    return int((picture == (44, 160, 44)).all(-1).sum())


def test_the_chain_comes_first_and_the_verdict_last() -> None:
    frames = pictures({"base": drawn([False, False]), "PRFL": drawn([False, True])}, PROMPTS)
    assert len(frames) == STEPS + REPEATS * FRAMES
    assert len({frame.shape for frame in frames}) == 1
    assert [greens(frame) > 0 for frame in frames] == [False] * STEPS + [True] * REPEATS * FRAMES
    assert (frames[0] != frames[STEPS - 1]).any(), "the curves grow"


@pytest.mark.slow
def test_more_that_is_right_shows_more_green() -> None:
    (*_, some), (*_, all_of_them) = (
        pictures({"base": drawn([False, False]), "PRFL": drawn(right)}, PROMPTS)
        for right in ([True, False], [True, True])
    )
    assert greens(all_of_them) > 1.5 * greens(some)
