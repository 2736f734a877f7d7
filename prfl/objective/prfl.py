"""PRFL (arXiv 2511.21541): one step m of the chain, drawn anew each time, and a latent reward at the state it reaches.

m ~ U over the chain;    x[m+1] = x[m] + (sigma[m+1] - sigma[m]) v(x[m], sigma[m]);    L = loss(r(x[m+1], sigma[m+1]))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from prfl import draws
from prfl.errors import PrflError
from prfl.objective.pathwise import Choice
from prfl.rollout import clean_jump, clean_node, one_step
from prfl.solvers import Coefficients, unit_step_weight


@dataclass(frozen=True)
class Prfl:
    """handoff: score the ``next`` latent of the step, or (as ReFL) its ``clean`` prediction.

    step_weight: ``native``, or ``unit``, which makes every step's gradient weigh alike (native: in proportion to
    |sigma[m+1] - sigma[m]|, 22-fold over Wan's chain).
    steps_range: the part of the chain that m is drawn from, as shares: 0 is the noisy end, 1 the clean one.
    """

    coefficients: Coefficients
    seed: int
    handoff: Literal["next", "clean"] = "next"
    step_weight: Literal["native", "unit"] = "native"
    steps_range: tuple[float, float] = (0.0, 1.0)

    @property
    def candidates(self) -> range:
        """The steps that m is drawn from."""
        low, high = self.steps_range
        steps = range(math.floor(low * self.coefficients.steps), math.ceil(high * self.coefficients.steps))
        if not steps:
            what = f"no step of the chain lies in {low} to {high}"
            raise PrflError(what, where="objective.steps_range", fix="widen it")
        return steps

    @property
    def noisy(self) -> bool:
        """The last step of the chain reaches sigma 0; every other next latent has noise."""
        return self.handoff == "next" and self.candidates[0] + 1 < self.coefficients.steps

    def choose(self, step: int) -> Choice:
        m = self.candidates[draws.integer(len(self.candidates), self.seed, "prfl/step", step)]
        weight = unit_step_weight(self.coefficients) if self.step_weight == "unit" else None
        if self.handoff == "clean":
            return Choice(clean_jump(self.coefficients, m, step_weight=weight), clean_node(self.coefficients, m))
        return Choice(one_step(self.coefficients, m, step_weight=weight), m + 1)
