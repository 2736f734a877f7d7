"""Other values in the trained parameters, for a while or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold ``values``; afterwards, their own again."""
    own = {name: p.detach().clone() for name, p in parameters.items()}
    copy_into(parameters, values)
    try:
        yield
    finally:
        copy_into(parameters, own)
