"""What steering costs, in network calls: one is a forward pass of the video model for one sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prices:
    """In network calls.

    step: of a solver step of one sample, 2 under guidance.  decode: of decoding one video.  step_at: of a step at a
    noise level, where it is less at some, as two experts are not guided alike; None is step at all.
    """

    step: float = 1.0
    decode: float = 0.0
    step_at: Callable[[float], float] | None = None

    def at(self, sigma: float | Tensor) -> float:
        """Of a step at this noise level."""
        return self.step if self.step_at is None else self.step_at(float(sigma))


BACKWARD = 2.0  # a backward pass costs as much as two forward passes


@dataclass(frozen=True)
class Calls:
    """Network calls by what they were for: solver steps, readings of rewards, decodes."""

    policy: float = 0.0
    reward: float = 0.0
    decodes: float = 0.0

    @property
    def total(self) -> float:
        return self.policy + self.reward + self.decodes

    def __add__(self, other: Calls) -> Calls:
        return Calls(self.policy + other.policy, self.reward + other.reward, self.decodes + other.decodes)

    def __mul__(self, count: int) -> Calls:
        return Calls(self.policy * count, self.reward * count, self.decodes * count)

    def __truediv__(self, count: int) -> Calls:
        return Calls(self.policy / count, self.reward / count, self.decodes / count)
