"""How far the policy's velocity is from the base's at given states: a metric, and a regulariser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.adapters import dropouts_of
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
    base = base_velocity(backbone, latents, sigma, condition)
    policy = backbone.velocity(latents, sigma.to(latents.device, torch.float32), condition)
    return (policy.float() - base).square().flatten(1).mean(1)


@torch.no_grad()
def base_velocity(backbone: Backbone, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Return the base's velocity in float32, whatever adapter is selected around."""
    with backbone.adapter(None):
        return backbone.velocity(latents, sigma.to(latents.device, torch.float32), condition).float()


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


def shares_call(backbone: Backbone, adapter: str, step_plan: StepPlan, guidance_scale: object) -> bool:
    """Return whether the velocity that a step differentiates is the distance's too: see ``DistanceTerm``.

    guidance_scale: a number, or one of each of two experts.
    """
    plan = step_plan.plan
    alone = len(plan.trains) == 1 and not any(plan.passes(k, plan.useful_nodes) for k in plan.trains)
    return alone and guidance_scale == 1 and not any(dropouts_of(each, adapter) for each in backbone.networks.values())


@dataclass
class DistanceTerm:
    """The gradient of weight * ``velocity_distance`` at the one velocity that a step differentiates anyway.

    It saves the distance's own call and its backward: two of a PRFL step's networks with gradient become one.  Only
    where ``shares_call``: guidance and dropout would make the step's velocity another one, and an earlier step would
    get the distance's gradient through its latents, which the distance takes as they are.
    """

    backbone: Backbone
    condition: Condition
    weight: float
    value: float = float("nan")

    @torch.no_grad()
    def __call__(self, latents: Tensor, sigma: Tensor, velocity: Tensor) -> Tensor:
        """Return d (weight * distance) / d velocity, and keep the distance as ``value``."""
        difference = velocity.float() - base_velocity(self.backbone, latents, sigma, self.condition)
        self.value = float(difference.square().mean())
        return 2 * self.weight / difference.numel() * difference
