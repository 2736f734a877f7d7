"""A second objective that takes turns with the first: it holds the policy near its data while a reward pulls it."""

from __future__ import annotations

from dataclasses import dataclass

from prfl.objective import Objective


@dataclass(frozen=True)
class Regulariser:
    """An objective over the same parameters, with an optimizer step of its own before a reward step (the paper's
    alternation): each step is clipped by itself, so neither can drown the other in one.

    Both share AdamW's moments.  So the factor of the regulariser's loss still matters (its gradients enter the same
    averages), and every update carries some of the other's direction by momentum.

    every: one such step before each ``every``-th reward step, the first included.
    """

    objective: Objective
    every: int = 1

    def due(self, step: int) -> bool:
        return step % self.every == 0
