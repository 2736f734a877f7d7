"""Of two networks that take turns along the chain one alone is trained: a method's steps at the other pass gradient on.

As a plain loop it is the method's own, with the parameters of the other network left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prfl.objective.methods.base import Method
from prfl.rollout.plan import Evaluated, Renoised, StepPlan
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class OfExperts:
    """trained: whether the network of this noise level is."""

    method: Method
    trained: Callable[[float], bool]

    @property
    def schedule(self) -> SolverSchedule:
        return self.method.schedule

    @property
    def seed(self) -> int:
        return self.method.seed

    @property
    def noisy(self) -> bool:
        return self.method.noisy

    def plan(self, step: int) -> StepPlan:
        step_plan = self.method.plan(step)
        trains = frozenset(k for k in step_plan.plan.trains if self.trained(sigma_of(self.schedule, k)))
        return replace(step_plan, plan=replace(step_plan.plan, trains=trains))


def sigma_of(schedule: SolverSchedule, k: Evaluated) -> float:
    """Return the noise level of a network evaluation."""
    return float(schedule.sigmas[k.i if isinstance(k, Renoised) else k])
