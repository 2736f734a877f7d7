"""Where chains start: the mean of the start noise is moved by policy gradient, round by round, as FIND does.

    z = (mu + eps) / sqrt(1 + |mu|^2 / d);    A = (r - mean r) / std r over the round's chains, looked at on the way
    mu <- mu + rate mean(A eps)               the score of N(mu, 1), with the round's mean reward as its baseline

A latent reward looks early, so that a round costs a part of its chains.  The last round's best chains are finished.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from prfl.steering.chains import Chains, Steered
from prfl.steering.process import Process
from prfl.utils.schedule import node_at


@dataclass(frozen=True)
class NoiseSearch:
    """chains: of a round.  look_at: share of the steps.  rate: of mu."""

    chains: int = 4
    keep: int = 1
    rounds: int = 3
    look_at: float = 0.5
    rate: float = 1.0

    def __call__(self, process: Process) -> Steered:
        mean = torch.zeros(())
        for number in range(self.rounds):
            start = self.started(process, number)
            drawn = start.latents
            if mean.ndim:
                size = (1 + mean.flatten(1).square().mean(1)).sqrt().reshape(-1, *[1] * (drawn.ndim - 1))
                start = replace(start, latents=(mean + drawn) / size)
            chains = process.look(process.step_to(start, node_at(self.look_at, process.steps)))
            scores = torch.tensor(chains.scores, dtype=torch.float64).reshape(-1, self.chains)
            gains = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True).clamp(min=1e-12)
            gains = gains.flatten().to(drawn).reshape(-1, *[1] * (drawn.ndim - 1))
            slope = (gains * drawn).reshape(-1, self.chains, *drawn.shape[1:]).mean(1)
            mean = mean + self.rate * slope.repeat_interleave(self.chains, 0)
        return process.finish(process.step_to(process.keep_best(chains, self.keep), process.steps))

    def started(self, process: Process, number: int) -> Chains:
        """A round's chains, from noises that no other round has."""
        chains = process.start(self.chains * self.rounds)
        rows = [row for row in range(len(chains)) if chains.slots[row] // self.chains == number]
        return chains.select(rows)
