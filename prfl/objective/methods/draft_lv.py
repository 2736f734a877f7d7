"""DRaFT-LV (arXiv 2309.17400): the gradient of the last step with less variance, for little more than one rollout.

The end of the chain is noised anew n times, to the sigma at which the last step starts, and each copy is denoised once:

    z[i] = (1 - sigma[N-1]) x[N] + sigma[N-1] noise[i];    L = mean of loss(r(x[N])), loss(r(z[i] - sigma[N-1] v(z[i])))

No gradient flows from z[i] to x[N].  The paper has n = 2.  It sums the losses; the mean taken here lets a learning rate
mean the same for every n.

As a plain loop: tests/objective/naive.py: low_variance
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import Evaluated, Plan, Renoised, StepPlan, jump_edge, step_edge
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class DraftLv:
    """DRaFT-LV.  copies: n, how many noised copies of the end are denoised.  The chain needs two steps or more."""

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
