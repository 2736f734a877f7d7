"""AlignProp (arXiv 2310.03739): DRaFT-K with K drawn anew for each batch, so that no depth is favoured.

K ~ U{1 .. N - 1} unless a range is given, so the whole chain is never trained.  (The official code has 50 steps and
cuts the gradient at a step drawn from normal(42, 5).)

As a plain loop: tests/objective/naive.py: truncated
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import StepPlan, last_steps
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class AlignProp:
    """AlignProp.  last_steps: smallest and largest K, both included; None is 1 to N - 1."""

    schedule: SolverSchedule
    seed: int
    last_steps: tuple[int, int] | None = None

    noisy = False

    def plan(self, step: int) -> StepPlan:
        steps = self.schedule.steps
        low, high = self.last_steps or (1, steps - 1)
        count = low + rng.integer(high + 1 - low, self.seed, "alignprop/last_steps", step)
        return StepPlan(last_steps(self.schedule, count), {steps: 1.0})
