"""The steps of a chain from which a method draws, and where its chain starts."""

from __future__ import annotations

import math

from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng
from prfl.utils.errors import PrflError


def steps_in(schedule: SolverSchedule, shares: tuple[float, float]) -> range:
    """Return the steps in a part of the chain, given as two shares of its length: 0 is the noisy end, 1 the clean end.

    Raises PrflError where the part has no step.
    """
    low, high = shares
    steps = range(math.floor(low * schedule.steps), math.ceil(high * schedule.steps))
    if not steps:
        what = f"no step of the chain lies in {low} to {high}"
        raise PrflError(what, where="objective.steps_range", fix="widen it")
    return steps


def starts_from_data(share: float, seed: int, step: int) -> bool:
    """Return whether the chains of optimizer step ``step`` start from noised clips; a ``share`` of all steps do."""
    return share > 0 and float(rng.uniform(seed, "from_data", step, [0])) < share


def behind_noise(steps: range) -> range:
    """Return the steps before which a noised clip can start: all but step 0, where nothing of the clip is left."""
    return range(max(1, steps.start), steps.stop)
