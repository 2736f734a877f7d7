"""DRaFT-LV (arXiv 2309.17400): the last step's gradient with less variance, at a small part of a rollout's cost.

The chain's end is noised anew n times to the sigma of the last step's start, and each copy is denoised once:

    z[i] = (1 - sigma[N-1]) x[N] + sigma[N-1] noise[i];    L = mean of loss(r(x[N])), loss(r(z[i] - sigma[N-1] v(z[i])))

No gradient flows from z[i] to x[N].  n = 2 in the paper (which sums; the mean keeps the learning rate's meaning).
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.objective.step_plan import StepPlan
from prfl.rollout.plan import Edge, Plan, step_edge
from prfl.rollout.solvers import SolverSchedule, leap


@dataclass(frozen=True)
class DraftLv:
    """copies: n, the times that the end is noised anew; the chain has two steps or more."""

    schedule: SolverSchedule
    copies: int = 2

    noisy = False

    def plan(self, step: int) -> StepPlan:
        steps = self.schedule.steps
        a, b = leap(self.schedule, steps - 1, 0.0)
        # Nodes 2 N + 1 and on, two for each copy: where it starts and where it ends.
        starts = [2 * steps + 1 + 2 * i for i in range(self.copies)]
        edges = [step_edge(self.schedule, steps - 1), *(Edge(z, z + 1, a, {z: b}, 0.0) for z in starts)]
        trains = frozenset([steps - 1, *starts])
        plan = Plan(edges, trains, dict.fromkeys(trains, 0.0))
        return StepPlan(plan, {edge.target: 1 / len(edges) for edge in edges}, noised=dict.fromkeys(starts, steps - 1))
