"""VADER (arXiv 2407.08737): the last K steps of the chain, exactly, and a reward on its end; K = 1 in the paper.

With a pixel reward the seed comes through the decoder (``scorer.PixelScorer``, which also draws the frames); with a
latent reward it is the latent reward at the last step only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prfl.objective.pathwise import Choice
from prfl.rollout import last_steps
from prfl.solvers import Coefficients, unit_step_weight


@dataclass(frozen=True)
class Vader:
    """last_steps: K, from 1 to the length of the chain.  step_weight: as for PRFL."""

    coefficients: Coefficients
    last_steps: int = 1
    step_weight: Literal["native", "unit"] = "native"

    noisy = False

    def choose(self, step: int) -> Choice:
        weight = unit_step_weight(self.coefficients) if self.step_weight == "unit" else None
        return Choice(last_steps(self.coefficients, self.last_steps, step_weight=weight), self.coefficients.steps)
