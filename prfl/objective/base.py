"""What the trainer knows of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Mean(float):
    """A metric that is a mean over only ``count`` of the samples, such as those that have a label."""

    count: int

    def __new__(cls, value: float, count: int) -> Mean:
        mean = super().__new__(cls, value)
        mean.count = count
        return mean

    def __reduce__(self) -> tuple[type[Mean], tuple[float, int]]:  # for its way to the other processes
        return Mean, (float(self), self.count)


@runtime_checkable
class Stateful(Protocol):
    """An objective that carries something from one optimizer step to the next."""

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """After each step that is whole: its metrics over the whole batch, the same on every process."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint saves of it, the same on every process; empty where there is nothing."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` gave.  Raises PrflError, and changes nothing, when it does not fit."""
        ...


@runtime_checkable
class Objective(Protocol):
    """One method: which samples, which forward passes, which gradients."""

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """Run forward and backward for these global sample indices.

        Adds the gradient of the *mean* loss over ``indices`` to ``.grad`` of ``parameters()`` and returns metrics.
        Every random draw is a function of (seed, step, index), so how a batch is split changes nothing but rounding.
        Each metric is a mean over ``indices`` or a ``Mean``; NAME_std, beside NAME, is a deviation over them; seconds/
        are spent, not averaged.
        """
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the optimizer updates, by name."""
        ...

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the batch as it was drawn, tensors and facts for JSON, to be written when a step fails."""
        ...
