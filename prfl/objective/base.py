"""The protocols by which the trainer calls an objective."""

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

    def __reduce__(self) -> tuple[type[Mean], tuple[float, int]]:  # pickled when it is sent to the other processes
        return Mean, (float(self), self.count)


@runtime_checkable
class Stateful(Protocol):
    """An objective that carries something from one optimizer step to the next."""

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Called after each complete optimizer step.  metrics: over the whole batch, the same on every process."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint saves, the same on every process; empty where there is no state."""
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned.  Raises PrflError, and changes nothing, when it does not fit."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What is trained: which samples are drawn, which forward passes are run, which gradients are added."""

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """Run forward and backward for these global sample indices.

        Adds the gradient of the *mean* loss over ``indices`` to ``.grad`` of ``parameters()`` and returns metrics.
        Every random draw is a function of (seed, step, index), so splitting a batch changes nothing but rounding.
        Each metric is a mean over ``indices``, or a ``Mean`` over some of them.  Two kinds of names are treated
        otherwise: NAME_std beside NAME is the standard deviation over ``indices``, and seconds/... is time spent,
        which adds up over the parts of a batch.
        """
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimizer updates, by name."""
        ...

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the batch as it was drawn, as tensors and as facts for JSON.  It is written when a step fails."""
        ...
