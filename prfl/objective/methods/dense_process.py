"""Dense process rewards: rewards at several states of one rollout, their gradients summed in one adjoint pass.

PRFL throws its rollout away after one gradient.  Here the chain is cut into several equal parts, and one step m is
drawn from each.  The reward is read at the latents behind each drawn step, (x[m+1], sigma[m+1]), or at its clean
prediction, x[m] - sigma[m] v(x[m]):

    L = mean over the drawn m of loss(r[m])

credit ``step``: each reward trains only its own step.  The gradient is the mean of several PRFL gradients from one
rollout.  (The later steps of a multistep solver contain earlier outputs, and train those too.)
credit ``chain``: each reward also trains the steps before it, along the chain; beta is the share of the gradient that
passes through the networks' inputs.  With beta 0 only the drawn steps are trained, with one network call each.  With
beta above 0 every step from the first drawn one on is trained.  Beta 1 is the exact gradient of these steps.

In a share ``from_data`` of the optimizer steps the chain starts at the first drawn step, from noised clips.

As a plain loop: tests/objective/naive.py: dense
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from prfl.objective.methods.steps import behind_noise, starts_from_data, steps_in
from prfl.rollout.plan import Plan, StepPlan, jump_edge, step_edge
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class DenseProcess:
    """Dense process rewards.  handoff, steps_range: see ``Prfl``.

    rewards: how many rewards are read in a rollout, at most the number of steps in ``steps_range``.
    beta: see above; used with credit ``chain`` only.
    from_data: see ``Prfl``; above 0 it needs at least ``rewards`` steps in ``steps_range`` without the chain's first.
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
        """Return the drawn steps, one from each part of the chain, in ascending order."""
        steps = steps_in(self.schedule, self.steps_range)
        if self.starts_from_data(step):
            steps = behind_noise(steps)
        bounds = [len(steps) * part // self.rewards for part in range(self.rewards + 1)]
        drawn = []
        for part, (low, high) in enumerate(pairwise(bounds)):
            drawn.append(steps[low + rng.integer(high - low, self.seed, "dense/step", step, part)])
        return drawn

    def starts_from_data(self, step: int) -> bool:
        return starts_from_data(self.from_data, self.seed, step)

    def plan(self, step: int) -> StepPlan:
        drawn = self.drawn(step)
        first, last = drawn[0], drawn[-1]
        clean = self.handoff == "clean"
        scored = [jump_edge(self.schedule, m) if clean else step_edge(self.schedule, m) for m in drawn]

        # The edges of the scored steps alone, or of the chain that leads the gradient to earlier steps as well.
        if self.credit == "step":
            edges = [replace(edge, through=0.0) for edge in scored]
            beta = 0.0
        else:
            chain = [step_edge(self.schedule, i) for i in range(first, last)]
            edges = [*chain, *(scored if clean else scored[-1:])]
            beta = self.beta
        trains = frozenset(range(first, last + 1) if beta else drawn)
        plan = Plan(edges, trains, {k: beta for edge in edges for k in edge.b})

        seeds = {edge.target: 1 / len(scored) for edge in scored}
        return StepPlan(plan, seeds, first if self.starts_from_data(step) else 0)
