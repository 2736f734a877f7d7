"""Arithmetic in 8 bits, for network calls without gradient: float8 products of linear layers, int8 attention.

Both round what they multiply, by one scale a row, as fast kernels read it.  On a CPU the rounding is the same and
nothing is faster: it serves to see what the rounding does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of float8 e4m3
TILE = 16  # a GPU's float8 products want multiples of it


def int8(x: Tensor) -> Tensor:
    """x rounded to 255 levels of each row's largest value."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def float8(x: Tensor) -> Tensor:
    """x rounded to float8 e4m3 (3 bits of mantissa) of each row's largest value."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(FLOAT8).to(x.dtype) * scale


# What SageAttention 2 rounds queries and keys to, and values (arXiv 2411.10958); it smooths the keys, too.
QUERIES_AND_KEYS: Callable[[Tensor], Tensor] = int8
VALUES: Callable[[Tensor], Tensor] = float8


def int8_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention with int8 queries and keys and float8 values.  (B, T, H, C) each; the type of the query.

    On a GPU by the package ``sageattention``, elsewhere with the rounding simulated: one scale a token and head.
    """
    if query.is_cuda:
        return dispatch_attention_fn(query, key, value, backend="sage")
    query, key, value = QUERIES_AND_KEYS(query), QUERIES_AND_KEYS(key), VALUES(value)
    return dispatch_attention_fn(query, key, value, backend="native")


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (n, d) in float8, and their scales (n, 1) in float32: x is about their product.

    It reads x twice and writes half as much once, with nothing between that is as large.  Of Wan 14B at 480p x 81
    frames, by counts at 4.2 TB/s: the weights in 17 ms of a call, what they are multiplied with in 78 ms, where the
    products take 0.58 s in float8 and 1.16 s in bfloat16.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True).float().clamp(min=1e-12)
    rounded = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    torch.mul(x, LARGEST / largest, out=rounded)
    return rounded, largest / LARGEST


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias with both factors in float8 and the sums in float32.  x: (.., d), weight: (out, d).

    The type is that of ``F.linear`` there (autocast's, where it is on); a GPU multiplies to bfloat16 first.
    """
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    rows, row_scales = quantised(x.reshape(-1, x.shape[-1]))
    columns, column_scales = quantised(weight)
    # A GPU has kernels for such shapes alone.
    by_kernel = x.is_meta or (x.is_cuda and weight.shape[0] % TILE == weight.shape[1] % TILE == 0)
    product = float8_product if by_kernel else wide_product
    return product(rows, row_scales, columns, column_scales, bias, dtype).to(dtype).unflatten(0, x.shape[:-1])


def float8_product(
    rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """By torch's own product: to bfloat16 on a GPU, which has no other with such scales, or where that is ``dtype``."""
    narrow = rows.is_cuda or dtype == torch.bfloat16
    # No fast accumulation: it keeps about 14 bits of a sum, and a feed-forward layer adds 13,824 terms.
    product = torch._scaled_mm(
        rows, columns.t(), scale_a=row_scales, scale_b=column_scales.t(), use_fast_accum=False,
        bias=bias.bfloat16() if narrow and bias is not None else None,
        out_dtype=torch.bfloat16 if narrow else torch.float32,
    )  # fmt: skip
    return product if narrow or bias is None else product.add_(bias)


def wide_product(
    rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same numbers by a product in float32: float8 values and their products are exact there."""
    with torch.autocast(rows.device.type, enabled=False):
        product = rows.float() @ columns.float().t() * row_scales * column_scales.t()
        return product if bias is None else product.add_(bias)


class Float8Linear(nn.Linear):
    """What a linear layer is for a while.  By its type others see that they must call it, not read its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return float8_linear(x, self.weight, self.bias)
