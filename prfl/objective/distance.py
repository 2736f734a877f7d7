"""The distance between the policy's velocity and the base's at the same states: a metric, and a regulariser."""

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
"""Latents and their sigma."""


def trained_states(trajectory: Trajectory, step_plan: StepPlan) -> Iterator[State]:
    """Yield the states at which a step trains, one at a time because they may wait in host memory."""
    for k in sorted(step_plan.plan.trains, key=order):
        x = trajectory.at(k)
        yield x, trajectory.sigma(k, x)


def squared_difference(backbone: Backbone, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Return the mean of (v_policy - v_base)^2 for each sample, (b,), without guidance.  sigma: () or (b,).

    Only the policy's velocity has a graph.  Call it while the policy's adapter is selected.
    """
    base = base_velocity(backbone, latents, sigma, condition)
    policy = backbone.velocity(latents, sigma.to(latents.device, torch.float32), condition)
    return (policy.float() - base).square().flatten(1).mean(1)


@torch.no_grad()
def base_velocity(backbone: Backbone, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """Return the base's velocity in float32, whichever adapter is selected by the caller."""
    with backbone.adapter(None):
        return backbone.velocity(latents, sigma.to(latents.device, torch.float32), condition).float()


@torch.no_grad()
def velocity_distance(backbone: Backbone, adapter: str, states: Iterable[State], condition: Condition) -> float:
    """Return the mean of ``squared_difference`` over states, which are taken one at a time to save memory."""
    with backbone.adapter(adapter):
        values = [squared_difference(backbone, x, sigma, condition).mean() for x, sigma in states]
    return float(torch.stack(values).mean())


def accumulate_distance(
    backbone: Backbone, adapter: str, states: Iterable[State], count: int, condition: Condition, weight: float
) -> float:
    """Add the gradient of weight * ``velocity_distance`` over ``count`` states to ``.grad``, and return the distance.

    Only one state's graph is alive at a time.
    """
    total = 0.0
    with backbone.adapter(adapter):
        for latents, sigma in states:
            value = squared_difference(backbone, latents, sigma, condition).mean() / count
            (weight * value).backward()
            total += float(value.detach())
    return total


def shares_call(backbone: Backbone, adapter: str, step_plan: StepPlan, guidance_scale: object) -> bool:
    """Return whether the distance can use the same network call as the step's own gradient: see ``DistanceTerm``.

    guidance_scale: a number, or a pair of numbers for a backbone of two experts.
    """
    plan = step_plan.plan
    alone = len(plan.trains) == 1 and not any(plan.passes(k, plan.useful_nodes) for k in plan.trains)
    return alone and guidance_scale == 1 and not any(dropouts_of(each, adapter) for each in backbone.networks.values())


@dataclass
class DistanceTerm:
    """The gradient of weight * ``velocity_distance``, added at the one velocity that the step differentiates anyway.

    This saves a forward and a backward for the distance alone: a PRFL step then has one network call with gradient
    instead of two.  It is valid only where ``shares_call`` says so.  With guidance or dropout the step's velocity is
    not the one that the distance compares.  With a cotangent to earlier steps, the distance's gradient would reach
    them through the latents, which the distance takes as constants.
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
