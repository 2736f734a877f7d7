"""Reward-gradient methods as loops in one joint graph, each from its paper's algorithm: no plans, no walk.

``world`` has start (b, ...), velocity(x, sigma), loss(x, sigma) -> (b,); all on Euler's steps over ``sigmas``.
Random plans are given: which steps, which noise.  Every function returns the loss, a scalar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class World:
    start: Tensor
    sigmas: Tensor
    velocity: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @torch.no_grad()
    def states(self) -> list[Tensor]:
        x = [self.start]
        for now, after in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            x.append(x[-1] + (after - now) * self.velocity(x[-1], now))
        return x

    def end(self, x: Tensor) -> Tensor:
        return self.loss(x, self.sigmas[-1]).mean()


def truncated(world: World, count: int, first: int = 0) -> Tensor:
    """DRaFT-K: Algorithm 1 of arXiv 2309.17400; all steps is DRaFT, a random count AlignProp."""
    x = world.start
    for i in range(first, world.steps):
        with torch.set_grad_enabled(i >= world.steps - count):
            x = x + (world.sigmas[i + 1] - world.sigmas[i]) * world.velocity(x, world.sigmas[i])
    return world.end(x)


def low_variance(world: World, noises: Sequence[Tensor]) -> Tensor:
    """DRaFT-LV: the last step, and as many fresh noisings of its stopped result to where it began."""
    last = world.sigmas[-2]
    before = world.states()[-2]
    result = before - last * world.velocity(before, last)
    losses = [world.end(result)]
    for noise in noises:
        noisy = (1 - last) * result.detach() + last * noise
        losses.append(world.end(noisy - last * world.velocity(noisy, last)))
    return torch.stack(losses).mean()


def one_prediction(world: World, m: int) -> Tensor:
    """ReFL: the clean prediction of step m."""
    x = world.states()[m]
    return world.end(x - world.sigmas[m] * world.velocity(x, world.sigmas[m]))


def one_step(world: World, m: int) -> Tensor:
    """PRFL: the state behind step m."""
    return one_step_from(world, m, world.states()[m])


def one_step_from(world: World, m: int, x: Tensor) -> Tensor:
    """x: the state at node m."""
    x = x + (world.sigmas[m + 1] - world.sigmas[m]) * world.velocity(x, world.sigmas[m])
    return world.loss(x, world.sigmas[m + 1]).mean()


def stopped_inputs(world: World, trained: Sequence[int], end: int | None) -> Tensor:
    """DRTune: Algorithm 1 of arXiv 2405.00760; end: the step at which it stops early, for its clean prediction."""
    x = world.start
    for i in range(world.steps):
        with torch.set_grad_enabled(i in trained):
            v = world.velocity(x.detach(), world.sigmas[i])
        if i == end:
            return world.end(x - world.sigmas[i] * v)
        x = x + (world.sigmas[i + 1] - world.sigmas[i]) * v
    return world.end(x)


def two_leaps(world: World, k: int, j: int, alpha: float, floor: float | None) -> Tensor:
    """LeapAlign (arXiv 2604.15311): two leaps, moved onto the chain; nested gradient times alpha; similarity weight."""
    states, sigmas = world.states(), world.sigmas
    leapt = states[k] - (sigmas[k] - sigmas[j]) * world.velocity(states[k], sigmas[k])
    x = leapt + (states[j] - leapt).detach()
    nested = alpha * x + (1 - alpha) * x.detach()
    landed = x - sigmas[j] * world.velocity(nested, sigmas[j])
    end = landed + (states[-1] - landed).detach()
    weight = torch.ones(len(end), dtype=end.dtype)
    if floor is not None:
        far = [
            (a - b).detach().abs().flatten(1).mean(1).clamp(min=floor)
            for a, b in ((leapt, states[j]), (landed, states[-1]))
        ]
        weight = 1 / (far[0] + far[1])
    return (weight * world.loss(end, sigmas[-1])).mean()


def dense(world: World, drawn: Sequence[int], beta: float, credit: str, handoff: str, first: int = 0) -> Tensor:
    """Rewards behind the drawn steps; beta > 0 trains every step from the first drawn one on."""
    x, losses = world.start, []
    for i in range(first, drawn[-1] + 1):
        if credit == "step":
            x = x.detach()
        with torch.set_grad_enabled(i in drawn if beta == 0 else i >= drawn[0]):
            v = world.velocity(beta * x + (1 - beta) * x.detach(), world.sigmas[i])
        clean = x - world.sigmas[i] * v
        x = x + (world.sigmas[i + 1] - world.sigmas[i]) * v
        if i in drawn:
            losses.append(world.end(clean) if handoff == "clean" else world.loss(x, world.sigmas[i + 1]).mean())
    return torch.stack(losses).mean()
