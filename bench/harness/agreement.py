"""Agreement of two ways to compute a thing, relative to float64 and to torch's own error in the same type."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0  # one may be this much further from the float64 result than torch in the same dtype is
ROUNDING = 4.0  # and a few roundings of the largest value more, for where torch is exact by luck


def distance(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference.  exact: in float64."""
    return (value.double() - exact).abs().max().item()


def too_far(
    outputs: Mapping[str, Tensor],
    torch_outputs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    factor: float = FACTOR,
    rounding: float = ROUNDING,
) -> list[str]:
    """List the outputs that are too far from the exact ones, a line each.

    Too far: max |output - exact| > factor max |torch_output - exact| + rounding eps max |exact|.
    exact: in float64 from the same (rounded) inputs.  eps: of the torch outputs' dtype.
    """
    wrong = []
    for name, exact_value in exact.items():
        output, torch_output = outputs[name], torch_outputs[name]
        if output.shape != exact_value.shape or not output.isfinite().all():
            wrong.append(f"{name}: {tuple(output.shape)} for {tuple(exact_value.shape)}, or not finite")
            continue
        slack = rounding * torch.finfo(torch_output.dtype).eps * exact_value.abs().max().item()
        error, torch_error = distance(output, exact_value), distance(torch_output, exact_value)
        if error > (limit := factor * torch_error + slack):
            wrong.append(f"{name}: error {error:.3g}, torch's own {torch_error:.3g}, limit {limit:.3g}")
    return wrong


def relative_errors(outputs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Return, of every output, the largest difference over the largest exact value."""
    errors = {}
    for name, exact_value in exact.items():
        errors[name] = distance(outputs[name], exact_value) / exact_value.abs().max().item()
    return errors
