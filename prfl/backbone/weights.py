"""Values of weights: checked where they are loaded, and others in the trained parameters for a while or for good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from prfl.utils.errors import PrflError


def is_finite(tensor: Tensor) -> bool:
    """By the extremes, which carry inf and nan along: no memory, and a small part of the time of ``isfinite``."""
    if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def check_finite(tensors: Mapping[str, Tensor], where: str, fix: str) -> None:
    """Raise PrflError that names the first tensor with values that are not finite: nothing good follows from them."""
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise PrflError(f"weights that are not finite: {bad[0]}{more}", where=where, fix=fix)


@contextmanager
def without_weights() -> Iterator[None]:
    """What is built inside lies on ``meta``: shapes and dtypes without memory, and no time goes to initial values."""
    with torch.device("meta"), no_init_weights():
        yield


@torch.no_grad()
def copy_into(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


SWAPPED: list[Mapping[str, nn.Parameter]] = []  # parameters that do not hold their own values just now


@contextmanager
def holding(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold ``values``; afterwards, their own again."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    SWAPPED.append(parameters)
    try:
        copy_into(parameters, values)
        yield
    finally:
        copy_into(parameters, before)
        SWAPPED.pop()  # not where an interrupt comes in the middle of the copying


def hold_their_own(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether no ``holding`` has put other values into these parameters, for now or (interrupted) for good."""
    ours = {id(parameter) for parameter in parameters.values()}
    return not any(id(parameter) in ours for swapped in SWAPPED for parameter in swapped.values())


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As ``from_pretrained`` does: diffusers names the modules that stay in float32; buffers are left alone."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model
