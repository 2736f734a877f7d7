"""DRTune (arXiv 2405.00760): trains a few steps over the whole chain, and stops the gradient at every network's input.

    x[i+1] = x[i] + (sigma[i+1] - sigma[i]) v(sg(x[i]), sigma[i]),  parameters of v trained at K steps only

So the reward's gradient reaches early steps unchanged, and each trained step costs one network call with gradient.
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
    """DRTune.  trained_steps: K.  spacing: equal distances after a random first step (``even``), or ``random`` steps.

    early_stop: m is drawn from this share of the chain, counted from its end; 0 runs the chain to its end.
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
        # With an early stop the last edge is a jump to the clean prediction, else the chain's own last step.
        edges.append(jump_edge(self.schedule, end) if self.early_stop else step_edge(self.schedule, end))
        plan = Plan(edges, frozenset(trains), {k: 0.0 for edge in edges for k in edge.b})
        return StepPlan(plan, {edges[-1].target: 1.0})

    def end(self, step: int) -> int:
        """Return the last step that is run."""
        steps = self.schedule.steps
        late = max(1, round(self.early_stop * steps))
        return steps - 1 - rng.integer(late, self.seed, "drtune/end", step)

    def drawn(self, step: int, count: int) -> list[int]:
        """Return the K trained steps among the first ``count`` steps; all of these where they are K or fewer."""
        if self.trained_steps >= count:
            return list(range(count))
        if self.spacing == "random":
            return sorted(rng.permutation(count, self.seed, "drtune/steps", step)[: self.trained_steps])
        stride = count // self.trained_steps
        spare = count - stride * (self.trained_steps - 1)  # how many places there are for the first trained step
        first = rng.integer(spare, self.seed, "drtune/first", step)
        return [first + stride * i for i in range(self.trained_steps)]
