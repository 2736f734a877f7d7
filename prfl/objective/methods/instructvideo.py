"""InstructVideo (arXiv 2312.12490): the chain starts from a noised clip of the data; its last K steps are trained.

    x[first] = (1 - sigma[first]) clip + sigma[first] noise;    x[N] by the rest of the chain;    L = loss(r(x[N]))

The paper skips the first 40 % of the chain and has K = 1.  Its reward reads one frame from each of four segments and
weights the clip's middle more: ``reward.scorer.PixelScorer``.

As a plain loop: tests/objective/naive.py: truncated, with ``first``
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import StepPlan, last_steps
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class InstructVideo:
    """InstructVideo.  first: the node at which the chain starts, 1 to N - 1.  last_steps: K, at most N - first."""

    schedule: SolverSchedule
    seed: int
    first: int
    last_steps: int = 1

    noisy = False

    def plan(self, step: int) -> StepPlan:
        plan = last_steps(self.schedule, self.last_steps)
        return StepPlan(plan, {self.schedule.steps: 1.0}, first=self.first)
