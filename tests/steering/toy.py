"""A Gaussian rectified flow whose velocity, tilt and soft value are known: x0 ~ N(0.5, 0.8), r = x0, tilt exp(1.5 r).

The tilted distribution is N(0.5 + 1.5 * 0.8, 0.8) = N(1.7, 0.8).  rl_and_steering's numerical checks have the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prfl.backbone.condition import Ask, Condition
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import SOLVERS, SolverSchedule
from prfl.steering.calls import Prices
from prfl.steering.process import Look, Process

MEAN, VARIANCE, STRENGTH = 0.5, 0.8, 1.5
TILTED = MEAN + STRENGTH * VARIANCE
F64 = torch.float64
PRICES = Prices(1.0, 2.0)


def posterior(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x0 given x = (1 - sigma) x0 + sigma noise."""
    signal = 1 - sigma
    total = signal**2 * VARIANCE + sigma**2
    return MEAN + signal * VARIANCE / total * (x - signal * MEAN), VARIANCE * sigma**2 / total


def velocity(x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
    """E[noise - x0 | x]."""
    clean, _ = posterior(x, sigma)
    if float(sigma) == 0:
        return -clean
    return (x - clean) / sigma


def value(x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
    """log E[exp(STRENGTH x0) | x] / STRENGTH, the soft value of r = x0; (n,)."""
    clean, variance = posterior(x, sigma)
    return (clean + STRENGTH * variance / 2).flatten(1).sum(1)


def damped_value(x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
    """A head that is right at the end and too sure of nothing before: Feynman-Kac weights make up for it."""
    return (1 - sigma) * value(x, sigma)


def schedule(solver: str = "euler", steps: int = 20, **keys: float) -> SolverSchedule:
    return SOLVERS[solver](chain_sigmas(steps, 1.0), **keys)


def process(
    chain: SolverSchedule, groups: int = 1, looks: Sequence[Look] | None = None, seed: int = 0, batch: int = 4096
) -> Process:
    looks = [Look(value, calls=0.5)] if looks is None else looks
    asks = tuple(Ask(f"prompt {number}") for number in range(groups))
    return Process(
        lambda x, sigma, condition: velocity(x, sigma),
        chain,
        looks,
        Condition({}, asks),
        list(range(groups)),
        state=(1,),
        seed=seed,
        prices=PRICES,
        batch=batch,
        begin=lambda noise, condition: noise.double(),
    )
