"""PRFL (arXiv 2511.21541): one step m of the chain, drawn anew each time, and a latent reward at the state it reaches.

m ~ U over the chain;    x[m+1] = x[m] + (sigma[m+1] - sigma[m]) v(x[m], sigma[m]);    L = loss(r(x[m+1], sigma[m+1]))

With the clean hand-off, L = loss(r(x[m] - sigma[m] v(x[m], sigma[m]), 0)), and m from the last quarter, it is ReFL
(ImageReward, arXiv 2304.05977): 40 steps, m ~ U{30 .. 39}, a hinge.

Ours: in a share ``from_data`` of the optimizer steps, x[m] = (1 - sigma[m]) clip + sigma[m] noise.  Such a step needs
no rollout.

As a plain loop: tests/objective/naive.py: one_step; with the clean hand-off one_prediction
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prfl.objective.methods.steps import behind_noise, starts_from_data, steps_in
from prfl.rollout.plan import Clean, StepPlan, clean_jump, one_step
from prfl.rollout.solvers import SolverSchedule
from prfl.utils import rng


@dataclass(frozen=True)
class Prfl:
    """handoff: score the ``next`` latent of the step, or (as ReFL) its ``clean`` prediction.

    steps_range: the part of the chain that m is drawn from, as shares of its length: 0 is the noisy end, 1 the clean
    one.
    from_data: share of the optimizer steps whose chains start at m, from noised clips; there m is 1 or later.
    """

    schedule: SolverSchedule
    seed: int
    handoff: Literal["next", "clean"] = "next"
    steps_range: tuple[float, float] = (0.0, 1.0)
    from_data: float = 0.0

    @property
    def candidates(self) -> range:
        """The steps that m is drawn from."""
        return steps_in(self.schedule, self.steps_range)

    @property
    def noisy(self) -> bool:
        """Whether the reward may read noisy latents: only the last step's next latents are clean."""
        return self.handoff == "next" and self.candidates[0] + 1 < self.schedule.steps

    def plan(self, step: int) -> StepPlan:
        from_data = starts_from_data(self.from_data, self.seed, step)
        steps = behind_noise(self.candidates) if from_data else self.candidates
        m = steps[rng.integer(len(steps), self.seed, "prfl/step", step)]
        first = m if from_data else 0
        if self.handoff == "clean":
            return StepPlan(clean_jump(self.schedule, m), {Clean(m): 1.0}, first)
        return StepPlan(one_step(self.schedule, m), {m + 1: 1.0}, first)
