"""DRTune (arXiv 2405.00760): a few steps over the whole chain, with every network's input cut off from the gradient.

    x[i+1] = x[i] + (sigma[i+1] - sigma[i]) v(sg(x[i]), sigma[i]),  parameters of v trained at K steps alone

so that the reward's gradient reaches early steps unchanged, and each step costs one network call.
With an early stop the chain ends at the clean prediction of a late step m, and no step after m is run.

As a plain loop: tests/objective/naive.py: stopped_inputs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prfl.rollout.plan import Plan, StepPlan, jump_edge, step_edge
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class DrTune:
    """trained_steps: K.  spacing: ``even`` distances behind a random first one, or ``random``.

    early_stop: 0, or the last part of the chain that m is drawn from, as a share.
    """

    schedule: SolverSchedule
    seed: int
    trained_steps: int = 3
    spacing: Literal["even", "random"] = "even"
    early_stop: float = 0.0

    noisy = False

    def plan(self, step: int) -> StepPlan:
        end = self.end(step)
        trains = self.drawn(step, end + 1)
        edges = [step_edge(self.schedule, i) for i in range(min(trains), end)]
        # Where the chain runs to its end, the last step ends there too.
        edges.append(jump_edge(self.schedule, end) if self.early_stop else step_edge(self.schedule, end))
        plan = Plan(edges, frozenset(trains), {k: 0.0 for edge in edges for k in edge.b})
        return StepPlan(plan, {edges[-1].target: 1.0})

    def end(self, step: int) -> int:
        """Return the last step that is run."""
        steps = self.schedule.steps
        late = max(1, round(self.early_stop * steps))
        return steps - 1 - rng.integer(late, self.seed, "drtune/end", step)

    def drawn(self, step: int, count: int) -> list[int]:
        """Return the trained ones of the first ``count`` steps: all of them, where they are no more than K."""
        if self.trained_steps >= count:
            return list(range(count))
        if self.spacing == "random":
            return sorted(rng.permutation(count, self.seed, "drtune/steps", step)[: self.trained_steps])
        stride = count // self.trained_steps
        spare = count - stride * (self.trained_steps - 1)  # places for the first one
        first = rng.integer(spare, self.seed, "drtune/first", step)
        return [first + stride * i for i in range(self.trained_steps)]
