"""What the kernels' tests share: inputs, and the tolerance, which is relative to torch's own error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FACTOR = 2.0  # ours may be this much further from the float64 result than torch in the same dtype is
ROUNDING = 4.0  # and a few roundings of the largest value more, for where torch is exact by luck


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(device, dtype)


def assert_as_good(ours: Mapping[str, Tensor], torchs: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> None:
    """max |ours - exact| <= FACTOR max |torchs - exact| + ROUNDING eps max |exact|, for every named output.

    exact: in float64 from the same (rounded) inputs.  The message lists all outputs that are too far.
    """
    assert ours.keys() == torchs.keys() == exact.keys()
    wrong = []
    for name, wanted in exact.items():
        own, other = ours[name], torchs[name]
        assert own.dtype == other.dtype and own.shape == wanted.shape, f"{name}: {own.dtype} {tuple(own.shape)}"
        assert own.isfinite().all(), f"{name}: not finite"
        slack = ROUNDING * torch.finfo(own.dtype).eps * wanted.abs().max().item()
        error, limit = distance(own, wanted), FACTOR * distance(other, wanted) + slack
        if error > limit:
            wrong.append(f"{name}: error {error:.3g}, torch's own {distance(other, wanted):.3g}, limit {limit:.3g}")
    assert not wrong, "; ".join(wrong)


def distance(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item()
