"""A method whose plan trains only one of two networks (experts) that take turns along the chain.

Steps at the noise levels of the other network are not trained; gradient still passes through them.  The plain loop is
that of the method itself, with the parameters of the other network frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from prfl.objective.methods.base import Method
from prfl.rollout.plan import Evaluated, Renoised, StepPlan
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class OfExperts:
    """A method, restricted to one expert.  trained: sigma -> whether the expert that predicts there is trained."""

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
