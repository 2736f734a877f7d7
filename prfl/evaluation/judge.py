"""Judges measure decoded videos and are never differentiated: an oracle, or a metric held out from training."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Judge(Protocol):
    """Verdicts by name, higher is better; 0 or 1 where a judge is sure.  The name ``all`` is the headline, if given.

    ``measured/...`` is no verdict but a number that should stay what it is in the base's videos.
    """

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], prompts: list[str]) -> dict[str, Float[Tensor, " b"]]:
        """Judge videos.  pixels: decoded, in [-1, 1]; prompts: one per video."""
        ...
