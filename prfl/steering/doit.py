"""Guidance without the reward's gradient: Doob's h-transform by simulation, as DOIT does it (for black-box rewards).

    h(x) = E[exp(strength r(x0)) | x] at t = sigma;   x0^1 .. x0^K drawn from x by a few noisy steps
    grad log h = (1 - t) / t^2 (sum of w_i x0^i - their mean),    w = softmax(strength r(x0^i))
    v' = v - t / (1 - t) grad log h = v - (sum of w_i x0^i - their mean) / t

So one formula serves every solver, as in guidance.py.  The rollouts share their first network call with the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prfl.rollout.solvers import ancestral
from prfl.steering.chains import Chains, Steered
from prfl.steering.guidance import shortened
from prfl.steering.process import Process


@dataclass(frozen=True)
class Doit:
    """chains: K, rollouts at each corrected step, of ``rollout_steps`` steps.  keep: chains of a video.

    every: steps between two corrections.  longest: of a correction, in lengths of the velocity.
    """

    chains: int = 4
    keep: int = 1
    strength: float = 1.0
    every: int = 2
    rollout_steps: int = 2
    longest: float = 1.0

    def __call__(self, process: Process) -> Steered:
        chains = process.start(self.keep)
        while chains.node < process.steps:
            if chains.node % self.every == 0 and process.steps - chains.node > 1 and self.strength:
                chains = self.corrected(process, process.evaluate(chains))
            chains = process.step(chains)
        return process.finish(process.look(chains))

    def corrected(self, process: Process, chains: Chains) -> Chains:
        """The chains with the push in their network output."""
        velocity = chains.outputs[chains.node]
        ends, scores = self.ends(process, chains)
        weights = torch.softmax(self.strength * scores, 1).to(ends)
        pulled = (weights.reshape(*scores.shape, *[1] * (ends.ndim - 2)) * ends).sum(1) - ends.mean(1)
        push = shortened(pulled / float(process.schedule.sigmas[chains.node]), self.longest, velocity)
        return replace(chains, outputs={**chains.outputs, chains.node: velocity - push})

    def ends(self, process: Process, chains: Chains) -> tuple[Tensor, Tensor]:
        """K clean samples from every chain's state, (n, K, ...), and their scores, (n, K)."""
        nodes = self.nodes(chains.node, process.steps)
        short = replace(process, schedule=ancestral(process.schedule.sigmas[nodes], eta=1.0))
        parents = [row for row in range(len(chains)) for _ in range(self.chains)]
        slots = [slot * self.chains + k for slot in chains.slots for k in range(self.chains)]
        # The rollouts' noise is named by where they begin, so that no two corrections have the same.
        named = tuple((chains.node + 1) * 10_000 + slot for slot in slots)
        rolled = replace(chains.select(parents), node=0, slots=named, outputs={0: chains.outputs[chains.node][parents]})
        rolled = short.look(short.step_to(rolled, short.steps))
        process.calls = short.calls
        shape = (len(chains), self.chains)
        scores = torch.tensor(rolled.scores, dtype=torch.float64).reshape(shape)
        return rolled.latents.reshape(*shape, *rolled.latents.shape[1:]), scores

    def nodes(self, node: int, steps: int) -> list[int]:
        """The nodes of a rollout: from here to the end, in even strides."""
        count = min(self.rollout_steps, steps - node)
        return [node + round(k * (steps - node) / count) for k in range(count + 1)]
