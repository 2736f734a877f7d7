"""LatSearch's reward-guided resampling and pruning (arXiv 2603.14526) of chains that begin close to each other.

    z^0 = z,  z^k = sqrt(1 - b^2) z + b eps^k                 b = spread
    at each look: w = softmax(r / temperature);  every chain's total grows by w;  as many as there are are drawn by w,
    and copies are dropped, so that the pool only shrinks;  behind the last look the highest totals are finished

Theirs finishes the whole pool and then takes the highest total, which is the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prfl.steering.chains import Chains, Steered
from prfl.steering.choosing import one_of
from prfl.steering.process import Process
from prfl.utils.schedule import node_at


@dataclass(frozen=True)
class LatSearch:
    """look_at: shares of the steps, ascending."""

    chains: int = 6
    keep: int = 1
    spread: float = 0.1
    temperature: float = 1.0
    look_at: Sequence[float] = (0.2, 0.3, 0.4)

    def __call__(self, process: Process) -> Steered:
        chains, totals = self.variants(process), [0.0] * self.chains * len(process.groups)
        nodes = list(dict.fromkeys(node_at(share, process.steps) for share in self.look_at))  # few in a short chain
        for node in nodes:
            chains = process.look(process.step_to(chains, node))
            weights = self.weights(chains)
            totals = [total + weight for total, weight in zip(totals, weights, strict=True)]
            rows = self.highest(chains, totals) if node == nodes[-1] else self.drawn(process, chains, weights)
            process.reject(chains, sorted(set(range(len(chains))) - set(rows)))
            chains, totals = chains.select(rows), [totals[row] for row in rows]
        return process.finish(process.step_to(chains, process.steps))

    def variants(self, process: Process) -> Chains:
        """Chains that begin around the first one of each group."""
        chains = process.start(self.chains)
        parents = chains.latents[:: self.chains].repeat_interleave(self.chains, 0)
        moved = math.sqrt(1 - self.spread**2) * parents + self.spread * chains.latents
        moved[:: self.chains] = parents[:: self.chains]
        return replace(chains, latents=moved)

    def weights(self, chains: Chains) -> list[float]:
        """Each chain's share in its group."""
        scores = torch.tensor(chains.scores, dtype=torch.float64) / self.temperature
        shares = torch.zeros_like(scores)
        for rows in chains.rows_by_group.values():
            shares[rows] = torch.softmax(scores[rows], 0)
        return shares.tolist()

    def drawn(self, process: Process, chains: Chains, weights: Sequence[float]) -> list[int]:
        """The different rows among as many draws as there are; at least ``keep``."""
        if process.counting:
            return list(range(len(chains)))
        chosen: list[int] = []
        for group, rows in chains.rows_by_group.items():
            log_weights = torch.tensor([weights[row] for row in rows], dtype=torch.float64).log()
            draws = [process.uniform(group, chains.node, f"latsearch/{number}") for number in range(len(rows))]
            picked = list(dict.fromkeys(rows[one_of(log_weights, draw)] for draw in draws))
            others = sorted(set(rows) - set(picked), key=lambda row: -weights[row])
            chosen += sorted(picked + others[: max(0, self.keep - len(picked))])
        return chosen

    def highest(self, chains: Chains, totals: Sequence[float]) -> list[int]:
        ranked = [sorted(rows, key=lambda row: -totals[row]) for rows in chains.rows_by_group.values()]
        return [row for rows in ranked for row in rows[: self.keep]]
