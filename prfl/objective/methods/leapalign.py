"""LeapAlign (arXiv 2604.15311): gradient to any step of the chain through two leaps over it, whatever its length.

After a rollout, two of its steps k < j are drawn, and

    y[j] = x[k] + (sigma[j] - sigma[k]) v(x[k], sigma[k])             moved to the chain's own x[j], straight through
    y[N] = x[j] - sigma[j] v(alpha x[j] + (1 - alpha) sg(x[j]), sigma[j])     moved to x[N], where the reward is read

alpha damps the nested gradient through the second leap's input; DRTune drops it (alpha = 0).  A sample's loss weighs
1 / (max(floor, |y[j] - x[j]|) + max(floor, |y[N] - x[N]|)), mean absolute differences: leaps that land far from the
chain stand for it badly (``pathwise.leap_similarity``).
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.objective.choice import Choice
from prfl.rollout.plan import Plan, leap_edge
from prfl.rollout.solvers import Coefficients
from prfl.utils import rng


@dataclass(frozen=True)
class LeapAlign:
    """similarity_floor: None weighs all samples alike.  The chain has two steps or more."""

    coefficients: Coefficients
    seed: int
    alpha: float = 0.3
    similarity_floor: float | None = 0.1

    noisy = False

    def choose(self, step: int) -> Choice:
        steps = self.coefficients.steps
        k, j = sorted(rng.permutation(steps, self.seed, "leapalign/steps", step)[:2])
        edges = (leap_edge(self.coefficients, k, j), leap_edge(self.coefficients, j, steps))
        plan = Plan(edges, frozenset({k, j}), {k: 0.0, j: self.alpha})
        return Choice(plan, {steps: 1.0}, similarity=self.similarity_floor)
