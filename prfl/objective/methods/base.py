"""What a reward-gradient method is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from prfl.rollout.plan import StepPlan
from prfl.rollout.solvers import SolverSchedule


@runtime_checkable
class Method(Protocol):
    """A reward-gradient method.  Its plan is shared by the whole batch: a function of (seed, step)."""

    @property
    def schedule(self) -> SolverSchedule: ...

    @property
    def seed(self) -> int:
        """The seed of every draw of the run."""
        ...

    @property
    def noisy(self) -> bool:
        """Whether the method ever reads the reward at sigma > 0."""
        ...

    def plan(self, step: int) -> StepPlan: ...
