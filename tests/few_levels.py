"""A reward measured at six noise levels in place of two dozen: most of the time that a story of small models takes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from prfl.evaluation import reward_eval
from prfl.evaluation.reward_eval import EDGES, Level

ALL = reward_eval.levels
KEPT = ((0.0, 0.2), (0.0, 0.0), (0.85, 0.9), (0.9, 0.925), (1.0, 1.0))


def measure_few(patch: pytest.MonkeyPatch) -> None:
    """For tests that are not about the table of levels, which test_reward_eval.py is about."""
    patch.setattr(reward_eval, "levels", few)


def few(sampler_sigmas: Sequence[float] = (), edges: Sequence[float] = EDGES) -> list[Level]:
    """Some of each kind: three bins, where videos are clean and where experts change; both ends; one of the sampler."""
    every = ALL(sampler_sigmas[1:2], edges)
    return [level for level in every if level.kind == "sampler" or (level.low, level.high) in KEPT]
