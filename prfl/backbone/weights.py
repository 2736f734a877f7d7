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


SWAPPED: list[Mapping[str, nn.Parameter]] = []  # parameters that do not hold their own values just now


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold ``values``; afterwards, their own again."""
    own = {name: p.detach().clone() for name, p in parameters.items()}
    SWAPPED.append(parameters)
    try:
        copy_into(parameters, values)
        yield
    finally:
        copy_into(parameters, own)
        SWAPPED.pop()  # not where an interrupt comes in the middle of the copying


def hold_their_own(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether no ``holding`` has put other values into these parameters, for now or (interrupted) for good."""
    ours = {id(parameter) for parameter in parameters.values()}
    return not any(id(parameter) in ours for swapped in SWAPPED for parameter in swapped.values())
