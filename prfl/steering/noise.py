"""Where chains start: the mean of the start noise is moved by policy gradient, round by round, as FIND does.

    z = (mu + eps) / sqrt(1 + |mu|^2 / d);    A = (r - mean r) / std r over the round's chains, looked at on the way
    mu <- mu + rate mean(A eps)               the score of N(mu, 1), with the round's mean reward as its baseline

With ``gradient`` every chain's own start climbs, by the reward's gradient there, through the steps up to the look:

    z <- (z + rate |z| g / |g|) / sqrt(1 + rate^2),    g = dr(x[look]) / dz

A latent reward looks early, so that a round costs a part of its chains.  The last round's best chains are finished.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prfl.rollout.trajectory import sigma_at
from prfl.steering.calls import BACKWARD, Calls
from prfl.steering.chains import Chains, Steered
from prfl.steering.guidance import gradient_price, with_gradient
from prfl.steering.process import Process
from prfl.utils.schedule import node_at


@dataclass(frozen=True)
class NoiseSearch:
    """chains: of a round.  look_at: share of the steps.  rate: of mu, or of the climb."""

    chains: int = 4
    keep: int = 1
    rounds: int = 3
    look_at: float = 0.5
    rate: float = 1.0
    gradient: bool = False

    def __call__(self, process: Process) -> Steered:
        node = node_at(self.look_at, process.steps)
        chains = self.climbed(process, node) if self.gradient else self.drawn(process, node)
        return process.finish(process.step_to(process.keep_best(chains, self.keep), process.steps))

    def drawn(self, process: Process, node: int) -> Chains:
        """The last round's chains at the look, of new noises in every round."""
        mean = torch.zeros(())
        for number in range(self.rounds):
            start = self.started(process, number)
            noise = start.latents
            if mean.ndim:
                size = (1 + (mean / process.start_size).flatten(1).square().mean(1)).sqrt()
                start = replace(start, latents=(mean + noise) / per_sample(size, noise))
            chains = process.look(process.step_to(start, node))
            scores = torch.tensor(chains.scores, dtype=torch.float64).reshape(-1, self.chains)
            gains = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True).clamp(min=1e-12)
            slope = per_sample(gains.flatten().to(noise), noise) * noise
            slope = slope.reshape(-1, self.chains, *noise.shape[1:]).mean(1)
            mean = mean + self.rate * slope.repeat_interleave(self.chains, 0)
        return chains

    def started(self, process: Process, number: int) -> Chains:
        """A round's chains, from noises that no other round has."""
        chains = process.start(self.chains * self.rounds)
        rows = [row for row in range(len(chains)) if chains.slots[row] // self.chains == number]
        return chains.select(rows)

    def climbed(self, process: Process, node: int) -> Chains:
        """The last round's chains at the look, each from where its own start has climbed to."""
        start = process.start(self.chains)
        for _ in range(self.rounds - 1):
            noise, slope = start.latents, start_slope(process, start, node)
            lengths = [each.flatten(1).norm(dim=1) for each in (noise, slope)]
            size = self.rate * lengths[0] / lengths[1].clamp(min=torch.finfo(slope.dtype).tiny)
            start = replace(start, latents=(noise + per_sample(size, slope) * slope) / math.sqrt(1 + self.rate**2))
        return process.look(process.step_to(start, node))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def start_slope(process: Process, chains: Chains, node: int) -> Tensor:
    """The gradient of the looks at ``node`` in where the chains begin; counted.

    The adjoint of the solver's steps (rollout/adjoint.py, without parameters): one network call at a time is in memory.
    """
    groups, states, schedule = chains.groups, [chains.latents], process.schedule
    while chains.node < node:
        chains = process.step(chains)
        states.append(chains.latents)

    cotangent = look_slope(process, chains)
    at_outputs: dict[int, Tensor] = {}
    for i in reversed(range(node)):
        for k, factor in schedule.b[i].items():
            at_outputs[k] = at_outputs.get(k, 0) + factor * cotangent
        cotangent = schedule.a[i] * cotangent + pulled_back(process, states[i], i, groups, at_outputs.pop(i))
    return cotangent


def look_slope(process: Process, chains: Chains) -> Tensor:
    """The gradient of the looks in the chains' latents, some samples at a time."""
    sigma, parts = sigma_at(process.schedule, chains.node, chains.latents), []
    for part in process.parts(len(chains)):
        condition = process.condition[list(chains.groups[part])]
        parts.append(with_gradient(process, process.network, chains.latents[part], sigma, condition)[1])
    level = process.schedule.sigmas[chains.node]
    calls = Calls(policy=process.prices.at(level) * any(look.clean for look in process.looks))
    calls += gradient_price(process, level)
    process.calls += calls * len(chains)
    return torch.cat(parts)


def pulled_back(process: Process, latents: Tensor, node: int, groups: Sequence[int], cotangent: Tensor) -> Tensor:
    """What a cotangent of the network's output at a node is in its latents, some samples at a time."""
    sigma, parts = sigma_at(process.schedule, node, latents), []
    for part in process.parts(len(latents)):
        leaf = latents[part].detach().requires_grad_()
        with torch.enable_grad(), process.held():
            output = process.network(leaf, sigma, process.condition[list(groups[part])])
            parts.append(torch.autograd.grad(output, leaf, cotangent[part].to(output.dtype))[0])
    process.calls += Calls(policy=len(latents) * (1 + BACKWARD) * process.prices.at(process.schedule.sigmas[node]))
    return torch.cat(parts)
