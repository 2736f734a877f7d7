"""VADER (arXiv 2407.08737): the last K steps of the chain, exactly, and a reward on its end; K = 1 in the paper.

The same plan is DRaFT-K (arXiv 2309.17400), and with K the whole chain DRaFT, the exact gradient of the sampler.
With a pixel reward the seed comes through the decoder (``reward.scorer.PixelScorer``, which also draws the frames);
with a latent reward it is the latent reward at the chain's end only.

As a plain loop: tests/objective/naive.py: truncated
"""

from __future__ import annotations

from dataclasses import dataclass

from prfl.rollout.plan import StepPlan, last_steps
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class Vader:
    """last_steps: K, from 1 to the length of the chain."""

    schedule: SolverSchedule
    seed: int
    last_steps: int = 1

    noisy = False

    def plan(self, step: int) -> StepPlan:
        return StepPlan(last_steps(self.schedule, self.last_steps), {self.schedule.steps: 1.0})
