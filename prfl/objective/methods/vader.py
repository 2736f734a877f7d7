"""VADER (arXiv 2407.08737): the exact gradient of the last K steps, by a reward at the end; K = 1 in the paper.

DRaFT-K (arXiv 2309.17400) has the same plan.  Where K is the length of the chain it is DRaFT, the exact gradient of the
whole sampler.  A pixel reward's gradient comes through the decoder (``reward.scorer.PixelScorer``, which also draws the
frames).  A latent reward is read at the end of the chain only.

As a plain loop: tests/objective/naive.py: truncated
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import StepPlan, last_steps
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class Vader:
    """VADER and DRaFT-K.  last_steps: K, from 1 to the length of the chain."""

    schedule: SolverSchedule
    seed: int
    last_steps: int = 1

    noisy = False

    def plan(self, step: int) -> StepPlan:
        return StepPlan(last_steps(self.schedule, self.last_steps), {self.schedule.steps: 1.0})
