"""What the kernels' tests share: inputs, and the tolerance, which is relative to torch's own error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bench.harness.agreement import ROUNDING, too_far
from bench.harness.agreement import distance as distance
from tests.tolerance import tolerance


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return numbers.to(device, dtype)


def assert_as_good(
    ours: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    terms: int = 1,
    condition: float = 1.0,
) -> None:
    """Every named output has torch's type and ``too_far`` has nothing to say of it.

    exact: in float64 from the same (rounded) inputs.  The message lists all outputs that are too far.
    terms, condition: of the longest sum (``tests.tolerance``), where torch's own error is no measure of it: a few
    values, which on one processor are exact by luck.
    """
    assert ours.keys() == torchs.keys() == exact.keys()
    for name, wanted in exact.items():
        own = ours[name]
        assert own.dtype == torchs[name].dtype and own.shape == wanted.shape, f"{name}: {own.dtype} {tuple(own.shape)}"
        assert own.isfinite().all(), f"{name}: not finite"
    dtype = next(iter(torchs.values())).dtype
    rounding = tolerance(dtype, terms, condition=condition) / torch.finfo(dtype).eps if terms > 1 else ROUNDING
    wrong = too_far(ours, torchs, exact, rounding=rounding)
    assert not wrong, "; ".join(wrong)
