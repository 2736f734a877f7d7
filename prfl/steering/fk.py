"""Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848): N chains of a video, resampled by intermediate rewards.

With scores r at the looks and s = strength, the factors of a chain's weight at a look are

    difference: G = exp(s (r - r before))      max: G = exp(s max r so far)      sum: G = exp(s sum of r so far)

and at the end what makes their product exp(s r(x0)), the target's.  After each look the chains are drawn anew by G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from prfl.steering.chains import Chains, Steered, Trace
from prfl.steering.choosing import distinct, effective_size, resampled_rows
from prfl.steering.process import Process


@dataclass(frozen=True)
class FkSteering:
    """every: steps between two looks.  The best ``keep`` different chains by their last scores are kept."""

    chains: int = 8
    keep: int = 1
    strength: float = 1.0
    potential: Literal["difference", "max", "sum"] = "difference"
    every: int = 4

    def __call__(self, process: Process) -> Steered:
        chains, _ = self.weighted(process)
        return process.finish(process.keep_best(distinct(chains), self.keep))

    def weighted(self, process: Process) -> tuple[Chains, list[float]]:
        """All chains at the end, and the log weights by which they are the tilted distribution's samples."""
        chains = process.start(self.chains)
        product = [0.0] * len(chains)  # of all factors of a chain's past
        while True:
            chains = process.look(process.step_to(chains, min(chains.node + self.every, process.steps)))
            if chains.node == process.steps:
                factors = [self.strength * score - past for score, past in zip(chains.scores, product, strict=True)]
            else:
                factors = [self.factor(trace) for trace in chains.traces]
            self.note_size(process, chains, factors)
            if chains.node == process.steps:
                return chains, factors
            product = [past + factor for past, factor in zip(product, factors, strict=True)]
            rows = resampled_rows(process, chains, factors, "fk")
            chains, product = chains.select(rows).renumbered(), [product[row] for row in rows]

    def factor(self, trace: Trace) -> float:
        """log G at a chain's last look."""
        scores = [score for _, score in trace]
        match self.potential:
            case "difference":
                return self.strength * (scores[-1] - (scores[-2] if len(scores) > 1 else 0.0))
            case "max":
                return self.strength * max(scores)
            case "sum":
                return self.strength * sum(scores)

    def note_size(self, process: Process, chains: Chains, factors: list[float]) -> None:
        weights = torch.tensor(factors, dtype=torch.float64)
        sizes = [effective_size(weights[rows]) for rows in chains.rows_by_group.values()]
        process.note("effective size", sum(sizes) / len(sizes))
