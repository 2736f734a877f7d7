"""DRaFT-LV (arXiv 2309.17400): the last step's gradient with less variance, at a small part of a rollout's cost.

The chain's end is noised anew n times to the sigma of the last step's start, and each copy is denoised once:

    z[i] = (1 - sigma[N-1]) x[N] + sigma[N-1] noise[i];    L = mean of loss(r(x[N])), loss(r(z[i] - sigma[N-1] v(z[i])))

No gradient flows from z[i] to x[N].  n = 2 in the paper (which sums; the mean keeps the learning rate's meaning).

As a plain loop: tests/objective/naive.py: low_variance
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import Evaluated, Plan, Renoised, StepPlan, jump_edge, step_edge
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class DraftLv:
    """copies: n, the times that the end is noised anew; the chain has two steps or more."""

    schedule: SolverSchedule
    seed: int
    copies: int = 2

    noisy = False

    def plan(self, step: int) -> StepPlan:
        last = self.schedule.steps - 1
        copies = [Renoised(copy, last) for copy in range(self.copies)]
        edges = [step_edge(self.schedule, last), *(jump_edge(self.schedule, copy) for copy in copies)]
        trains: frozenset[Evaluated] = frozenset([last, *copies])
        seeds = {edge.target: 1 / len(edges) for edge in edges}
        return StepPlan(Plan(edges, trains, dict.fromkeys(trains, 0.0)), seeds)
