"""SVDD (Li et al. 2024, arXiv 2408.08252): of M next states of a chain, one is drawn by its soft value.

    x[i+1] is x^j with probability proportional to exp(strength v(x^j, sigma[i+1])),    x^1 .. x^M = steps from x[i]

The start is drawn as it is, so that the end is tilted in full only where it does not depend on the start: by the
ancestral solver with eta = 1.  v is read by the looks: a latent reward is the paper's learned value, a clean
prediction its posterior mean.  All M steps share one network output: with a latent reward the M states cost only its
looks.  ``greedy`` takes the highest value instead, and over-optimises (tests/steering/test_methods.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prfl.steering.chains import Chains, Steered
from prfl.steering.choosing import one_of
from prfl.steering.process import Process


@dataclass(frozen=True)
class Svdd:
    """chains: M, next states of each chain.  every: steps between two choices.  keep: chains of a video."""

    chains: int = 8
    keep: int = 1
    strength: float = 1.0
    every: int = 1
    greedy: bool = False

    def __call__(self, process: Process) -> Steered:
        chains = process.start(self.keep)
        while chains.node < process.steps:
            due = chains.node % self.every == 0 and process.schedule.c[chains.node] != 0 and self.strength != 0
            chains = self.chosen(process, chains) if due else process.step(chains)
        return process.finish(process.look(chains))

    def chosen(self, process: Process, chains: Chains) -> Chains:
        """One step of every chain, to one of its M next states."""
        parents = [row for row in range(len(chains)) for _ in range(self.chains)]
        states = process.look(process.step(process.evaluate(chains).select(parents).renumbered()))
        values = self.strength * torch.tensor(states.scores, dtype=torch.float64).reshape(len(chains), self.chains)
        rows = []
        for row, group in enumerate(chains.groups):
            draw = process.uniform(group, chains.node, f"svdd/{chains.slots[row]}")
            picked = int(values[row].argmax()) if self.greedy else one_of(values[row], draw)
            rows.append(row * self.chains + picked)
        return states.select(rows).renumbered()
