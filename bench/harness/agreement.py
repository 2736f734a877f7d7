"""Whether two ways to compute a thing agree, relative to float64 and to torch's own error in the same type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0  # one may be this much further from the float64 result than torch in the same dtype is
ROUNDING = 4.0  # and a few roundings of the largest value more, for where torch is exact by luck


def distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()


def too_far(
    outputs: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    factor: float = FACTOR,
    rounding: float = ROUNDING,
) -> list[str]:
    """Write a line for every named output where max |output - exact| > limit.

    limit = factor max |torchs - exact| + rounding eps max |exact|.

    exact: in float64 from the same (rounded) inputs.  eps: of torchs' dtype.
    """
    wrong = []
    for name, wanted in exact.items():
        value, by_torch = outputs[name], torchs[name]
        if value.shape != wanted.shape or not value.isfinite().all():
            wrong.append(f"{name}: {tuple(value.shape)} for {tuple(wanted.shape)}, or not finite")
            continue
        slack = rounding * torch.finfo(by_torch.dtype).eps * wanted.abs().max().item()
        error, theirs = distance(value, wanted), distance(by_torch, wanted)
        if error > (limit := factor * theirs + slack):
            wrong.append(f"{name}: error {error:.3g}, torch's own {theirs:.3g}, limit {limit:.3g}")
    return wrong


def relative_errors(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute, of every output, the largest difference over the largest exact value."""
    return {name: distance(outputs[name], wanted) / wanted.abs().max().item() for name, wanted in exact.items()}
