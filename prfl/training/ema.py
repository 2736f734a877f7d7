"""An exponential moving average of the trained parameters.

diffusers' ``EMAModel`` does not fit: it copies (does not average) every parameter whose ``requires_grad`` is off, and
outside the backbone's adapter context that is all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prfl.backbone.weights import holding


class Ema:
    """Average of named parameters.  The decay grows as (1 + n) / (10 + n) up to ``decay``, so early averages are not
    stuck at the start."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.updates = 0
        self.average = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the parameters inside the context; afterwards they have their values again."""
        with holding(self.parameters, self.average):
            yield

    def load(self, average: dict[str, Tensor], updates: int) -> None:
        """Restore the average and the number of updates of a checkpoint."""
        self.updates = updates
        for name, value in average.items():
            self.average[name].copy_(value)
