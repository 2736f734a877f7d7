"""LeapAlign (arXiv 2604.15311): gradient to any step of the chain through two leaps over it, whatever its length.

After a rollout, two of its steps k < j are drawn, and

    y[j] = x[k] + (sigma[j] - sigma[k]) v(x[k], sigma[k])             moved to the chain's own x[j], straight through
    y[N] = x[j] - sigma[j] v(alpha x[j] + (1 - alpha) sg(x[j]), sigma[j])     moved to x[N], where the reward is read

alpha damps the nested gradient through the second leap's input; DRTune drops it (alpha = 0).  A sample's loss weighs
1 / (max(floor, |y[j] - x[j]|) + max(floor, |y[N] - x[N]|)), mean absolute differences: leaps that land far from the
chain stand for it badly (``leap_similarity``).

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
    """similarity_floor: None weighs all samples alike.  The chain has two steps or more."""

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
    """Return 1 / sum over leaps of max(floor, mean |where it lands - the chain's own latents there|), of each sample.

    A sample counts by how well its leaps stand for the chain that they shorten.
    """
    distances = []
    for edge in step_plan.plan.edges:
        assert step_plan.similarity and isinstance(edge.target, int), f"no leap on the chain: {edge}"
        missed = target_latents(network, trajectory, edge) - trajectory.at(edge.target)
        distances.append(missed.abs().flatten(1).mean(1).clamp(min=step_plan.similarity))
    return 1 / torch.stack(distances).sum(0)
