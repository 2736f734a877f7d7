"""How far the policy's velocity is from the base's at given states: a metric, and a regulariser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.condition import Condition
from prfl.rollout.plan import StepPlan, order
from prfl.rollout.trajectory import Trajectory

State = tuple[Float[Tensor, "b c t h w"], Float[Tensor, ""]]
"""Latents, and their sigma."""


def trained_states(trajectory: Trajectory, step_plan: StepPlan) -> Iterator[State]:
    """Yield the states that a step trains at, one at a time: they may wait in host memory."""
    for k in sorted(step_plan.plan.trains, key=order):
        x = trajectory.at(k)
        yield x, trajectory.sigma(k, x)


def squared_difference(backbone: Backbone, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Return (b,) means of (v_policy - v_base)^2 without guidance; sigma: () or (b,).

    The base gets no graph.  Run it under the policy's adapter.
    """
    sigma = sigma.to(latents.device, torch.float32)
    with torch.no_grad(), backbone.adapter(None):
        base = backbone.velocity(latents, sigma, condition)
    return (backbone.velocity(latents, sigma, condition).float() - base.float()).square().flatten(1).mean(1)


@torch.no_grad()
def velocity_distance(backbone: Backbone, adapter: str, states: Iterable[State], condition: Condition) -> float:
    """Return the mean over states of ``squared_difference``; they are taken one at a time, from host memory too."""
    with backbone.adapter(adapter):
        values = [squared_difference(backbone, x, sigma, condition).mean() for x, sigma in states]
    return float(torch.stack(values).mean())


def accumulate_distance(
    backbone: Backbone, adapter: str, states: Iterable[State], count: int, condition: Condition, weight: float
) -> float:
    """Add the gradient of weight * ``velocity_distance`` over ``count`` states to ``.grad``, and return the distance.

    One state's graph is alive at a time.
    """
    total = 0.0
    with backbone.adapter(adapter):
        for latents, sigma in states:
            value = squared_difference(backbone, latents, sigma, condition).mean() / count
            (weight * value).backward()
            total += float(value.detach())
    return total
