"""Which steps of a chain a method draws from."""

from __future__ import annotations

import math

from prfl.errors import PrflError
from prfl.solvers import Coefficients


def steps_in(coefficients: Coefficients, shares: tuple[float, float]) -> range:
    """The steps in a part of the chain: 0 is the noisy end, 1 the clean one."""
    low, high = shares
    steps = range(math.floor(low * coefficients.steps), math.ceil(high * coefficients.steps))
    if not steps:
        what = f"no step of the chain lies in {low} to {high}"
        raise PrflError(what, where="objective.steps_range", fix="widen it")
    return steps
