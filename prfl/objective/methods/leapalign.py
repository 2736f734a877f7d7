"""LeapAlign (arXiv 2604.15311): gradient to any step of the chain through two leaps over it, whatever its length.

After a rollout, two of its steps k < j are drawn, and

    y[j] = x[k] + (sigma[j] - sigma[k]) v(x[k], sigma[k])             moved to the chain's own x[j], straight through
    y[N] = x[j] - sigma[j] v(alpha x[j] + (1 - alpha) sg(x[j]), sigma[j])     moved to x[N], where the reward is read

alpha damps the nested gradient through the second leap's input; DRTune drops it (alpha = 0).  A sample's loss weighs
1 / (max(floor, |y[j] - x[j]|) + max(floor, |y[N] - x[N]|)), mean absolute differences: leaps that land far from the
chain stand for it badly (``reward_gradient.leap_similarity``).
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.objective.step_plan import StepPlan
from prfl.rollout.plan import Plan, leap_edge
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class LeapAlign:
    """similarity_floor: None weighs all samples alike.  The chain has two steps or more."""

    schedule: SolverSchedule
    seed: int
    alpha: float = 0.3
    similarity_floor: float | None = 0.1

    noisy = False

    def plan(self, step: int) -> StepPlan:
        steps = self.schedule.steps
        k, j = sorted(rng.permutation(steps, self.seed, "leapalign/steps", step)[:2])
        edges = (leap_edge(self.schedule, k, j), leap_edge(self.schedule, j, steps))
        plan = Plan(edges, frozenset({k, j}), {k: 0.0, j: self.alpha})
        return StepPlan(plan, {steps: 1.0}, similarity=self.similarity_floor)
