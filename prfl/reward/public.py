"""What a reward that others trained, in files of its own form, has to have: reward/aesthetic.py is one.

Its config section is in config/sections/reward.py, its line in factory/reward.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.reward.scores import Normalisation, Scores


@runtime_checkable
class PublicReward(Protocol):
    """A frozen reward on decoded pixels, about [-1, 1] and unclamped, differentiable in them."""

    space: str
    noise_aware: bool
    differentiable: bool
    normalisation: Normalisation

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def frames_at_once(self) -> int | None:
        """Frames whose activations are alive together in the backward pass; None is all."""
        ...

    @property
    def card(self) -> None:
        """Nobody measured how well it ranks the run's videos."""
        ...

    def __call__(
        self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None
    ) -> Scores: ...

    def logits(
        self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None
    ) -> Scores: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...
