"""Dense process rewards: rewards at several states of one rollout, their gradients summed in one walk back.

PRFL throws its rollout away after one gradient.  Here one step is drawn from each of several equal parts of the chain,
and the reward is read behind each: at (x[m+1], sigma[m+1]), or at the clean prediction x[m] - sigma[m] v(x[m]):

    L = mean over the drawn m of loss(r[m])

credit ``step``: each reward trains its own step alone: the mean of as many PRFL gradients, from one rollout.  (A
multistep solver's later steps contain earlier outputs, and train those too.)
credit ``chain``: rewards reach the steps before them too, along the chain; beta is the share of the gradient that
passes through the networks' inputs.  With beta 0 the drawn steps are trained, a network call each; above 0 every step
from the first drawn one on is walked and trained; 1 is the exact gradient from there on.

In a share ``from_data`` of the optimizer steps the chain starts at the first drawn step, from noised clips.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from prfl.objective.methods.steps import behind_noise, starts_from_data, steps_in
from prfl.objective.step_plan import StepPlan
from prfl.rollout.plan import Plan, clean_node, jump_edge, step_edge
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class DenseProcess:
    """rewards: how many, no more than there are steps in ``steps_range`` (as for PRFL).  beta: for credit ``chain``.

    from_data: as for PRFL; there must be ``rewards`` steps behind the chain's first one.
    """

    schedule: SolverSchedule
    seed: int
    rewards: int = 4
    handoff: Literal["next", "clean"] = "next"
    credit: Literal["chain", "step"] = "chain"
    beta: float = 0.0
    steps_range: tuple[float, float] = (0.0, 1.0)
    from_data: float = 0.0

    @property
    def noisy(self) -> bool:
        return self.handoff == "next" and steps_in(self.schedule, self.steps_range)[0] + 1 < self.schedule.steps

    def drawn(self, step: int) -> list[int]:
        """One step of each part, ascending."""
        among = steps_in(self.schedule, self.steps_range)
        if self.starts_from_data(step):
            among = behind_noise(among)
        bounds = [len(among) * part // self.rewards for part in range(self.rewards + 1)]
        spans = zip(bounds[:-1], bounds[1:], strict=True)
        return [
            among[low + rng.integer(high - low, self.seed, "dense/step", step, part)]
            for part, (low, high) in enumerate(spans)
        ]

    def starts_from_data(self, step: int) -> bool:
        return starts_from_data(self.from_data, self.seed, step)

    def plan(self, step: int) -> StepPlan:
        drawn = self.drawn(step)
        first, last = drawn[0], drawn[-1]
        clean = self.handoff == "clean"
        scored = [jump_edge(self.schedule, m) if clean else step_edge(self.schedule, m) for m in drawn]
        if self.credit == "step":
            edges = [replace(edge, through=0.0) for edge in scored]
        else:
            chain = [step_edge(self.schedule, i) for i in range(first, last)]
            edges = [*chain, *(scored if clean else scored[-1:])]
        beta = self.beta if self.credit == "chain" else 0.0
        plan = Plan(edges, frozenset(range(first, last + 1) if beta else drawn), {k: beta for e in edges for k in e.b})
        nodes = [clean_node(self.schedule, m) if clean else m + 1 for m in drawn]
        return StepPlan(plan, dict.fromkeys(nodes, 1 / len(nodes)), first if self.starts_from_data(step) else 0)
