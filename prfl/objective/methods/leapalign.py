"""LeapAlign (arXiv 2604.15311): gradient to any step of a chain of any length, through two leaps over the chain.

After a rollout, two of its steps k < j are drawn, and

    y[j] = x[k] + (sigma[j] - sigma[k]) v(x[k], sigma[k])             moved to the chain's own x[j], straight through
    y[N] = x[j] - sigma[j] v(alpha x[j] + (1 - alpha) sg(x[j]), sigma[j])     moved to x[N], where the reward is read

alpha damps the nested gradient through the second leap's input; DRTune drops it (alpha = 0).  The weight of a sample's
loss is 1 / (max(floor, |y[j] - x[j]|) + max(floor, |y[N] - x[N]|)), with |.| the mean absolute difference: leaps that
land far from the chain represent it badly and count less (``leap_similarity``).

As a plain loop: tests/objective/naive.py: two_leaps
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.rollout.adjoint import target_latents
from prfl.rollout.plan import Plan, StepPlan, leap_edge
from prfl.rollout.solvers import SolverSchedule
from prfl.rollout.trajectory import Network, Trajectory
from prfl.utils import rng


@dataclass(frozen=True)
class LeapAlign:
    """LeapAlign, on a chain of two steps or more.  similarity_floor: the floor above; None weighs all samples alike."""

    schedule: SolverSchedule
    seed: int
    alpha: float = 0.3
    similarity_floor: float | None = 0.1

    noisy = False

    def plan(self, step: int) -> StepPlan:
        steps = self.schedule.steps
        k, j = sorted(rng.permutation(steps, self.seed, "leapalign/steps", step)[:2])
        edges = (leap_edge(self.schedule, k, j), leap_edge(self.schedule, j, steps))
        plan = Plan(edges, frozenset({k, j}), {k: 0.0, j: self.alpha})
        return StepPlan(plan, {steps: 1.0}, similarity=self.similarity_floor)


def leap_similarity(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> Float[Tensor, " b"]:
    """Return each sample's weight, (b,): 1 / sum over leaps of max(floor, mean |where it lands - the chain's latents|).

    The closer the leaps of a sample land to the chain, the more the sample counts.
    """
    distances = []
    for edge in step_plan.plan.edges:
        assert step_plan.similarity and isinstance(edge.target, int), f"no leap on the chain: {edge}"
        missed = target_latents(network, trajectory, edge) - trajectory.at(edge.target)
        distances.append(missed.abs().flatten(1).mean(1).clamp(min=step_plan.similarity))
    return 1 / torch.stack(distances).sum(0)
