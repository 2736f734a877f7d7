"""Triton sources of qk_norm_rope: one pass over q and one over k in each direction, both in one launch.

A program takes ROWS tokens of one batch item and of one of q and k, as a (ROWS, heads, channels) block padded to powers
of two; cosine and sine are loaded once for all heads.  Neighbouring programs take q and k of the same tokens, so that
the tables are read from memory once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prfl_kernels.ahead import Build
from prfl_kernels.builds import SHAPES, Shape

# With 16 elements a thread the layouts of loads, pairs and stores agree; with 32 the rows of 1.3B pass through shared
# memory, and the backward takes 94 to 128 registers instead of 64 (read from the compiled kernels).
THREAD = 16  # elements of a thread
ELEMENTS = 2048  # of a block at least, padding included: one token of Wan 1.3B; many where the model is small


@triton.jit
def _forward(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, rstd, tokens, q_batch, q_row, k_batch, k_row,
    SOURCES: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, CHANNELS_PADDED: tl.constexpr, EPS: tl.constexpr,
    ROTATE: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * CHANNELS
    source = tl.program_id(0) % SOURCES  # 0 is q, 1 is k
    token = tl.program_id(0) // SOURCES * ROWS + tl.arange(0, ROWS)
    item = tl.program_id(1).to(tl.int64)
    x, weight, out, start, stride = q, q_weight, q_out, item * q_batch, q_row
    if SOURCES == 2:
        if source == 1:
            x, weight, out, start, stride = k, k_weight, k_out, item * k_batch, k_row

    # The block's places: (tokens, heads, channels).
    head = tl.arange(0, HEADS_PADDED)[:, None]
    channel = tl.arange(0, CHANNELS_PADDED)[None, :]
    column = (head * CHANNELS + channel)[None, :, :]
    inside = ((head < HEADS) & (channel < CHANNELS))[None, :, :]
    row = token.to(tl.int64)[:, None, None]
    mask = (row < tokens) & inside

    # Each row over its root mean square, times the weight.
    value = tl.load(x + start + row * stride + column, mask=mask, other=0.0).to(ACC)
    scale = 1 / tl.sqrt(tl.sum(tl.sum(value * value, 2), 1) / WIDTH + EPS)
    if SAVE:
        line = (source * tl.num_programs(1) + item) * tokens + token
        tl.store(rstd + line, scale, mask=token < tokens)
    value = value * scale[:, None, None] * tl.load(weight + column, mask=inside, other=0.0).to(ACC)

    # Neighbouring channels are turned as pairs.
    if ROTATE:
        even, odd = _pairs(value, ROWS, HEADS_PADDED, CHANNELS_PADDED)
        c, s = _tables(cos, sin, token, tokens, CHANNELS, CHANNELS_PADDED, ACC)
        value = _joined(even * c - odd * s, even * s + odd * c, ROWS, HEADS_PADDED, CHANNELS_PADDED)

    line = (item * tokens + row) * WIDTH
    tl.store(out + line + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    q_grad, k_grad, q_saved, k_saved, rstd, q_weight, k_weight, cos, sin, q_out, k_out, tokens,
    q_grad_batch, q_grad_row, k_grad_batch, k_grad_row, q_batch, q_row, k_batch, k_row,
    SOURCES: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    HEADS_PADDED: tl.constexpr, CHANNELS_PADDED: tl.constexpr,
    ROTATE: tl.constexpr, FROM_OUTPUT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = HEADS * CHANNELS
    source = tl.program_id(0) % SOURCES
    token = tl.program_id(0) // SOURCES * ROWS + tl.arange(0, ROWS)
    item = tl.program_id(1).to(tl.int64)

    grad, saved, weight, out = q_grad, q_saved, q_weight, q_out
    grad_start, grad_stride, start, stride = item * q_grad_batch, q_grad_row, item * q_batch, q_row
    if SOURCES == 2:
        if source == 1:
            grad, saved, weight, out = k_grad, k_saved, k_weight, k_out
            grad_start, grad_stride, start, stride = item * k_grad_batch, k_grad_row, item * k_batch, k_row

    # The block's places: (tokens, heads, channels).
    head = tl.arange(0, HEADS_PADDED)[:, None]
    channel = tl.arange(0, CHANNELS_PADDED)[None, :]
    column = (head * CHANNELS + channel)[None, :, :]
    inside = ((head < HEADS) & (channel < CHANNELS))[None, :, :]
    row = token.to(tl.int64)[:, None, None]
    mask = (row < tokens) & inside

    # The gradient, what the forward pass kept, and the norm's statistics.
    g = tl.load(grad + grad_start + row * grad_stride + column, mask=mask, other=0.0).to(ACC)
    value = tl.load(saved + start + row * stride + column, mask=mask, other=0.0).to(ACC)
    w = tl.load(weight + column, mask=inside, other=1.0).to(ACC)
    line = (source * tl.num_programs(1) + item) * tokens + token
    scale = tl.load(rstd + line, mask=token < tokens, other=0.0)[:, None, None]
    if FROM_OUTPUT:  # the rotation keeps products: dy . y is what (R^T dy) . (R^-1 y) is
        mean = tl.sum(tl.sum(g * value, 2), 1)[:, None, None] / WIDTH

    # Back through the rotation.
    if ROTATE:
        c, s = _tables(cos, sin, token, tokens, CHANNELS, CHANNELS_PADDED, ACC)
        even, odd = _pairs(g, ROWS, HEADS_PADDED, CHANNELS_PADDED)
        g = _joined(even * c + odd * s, odd * c - even * s, ROWS, HEADS_PADDED, CHANNELS_PADDED)
        if FROM_OUTPUT:
            even, odd = _pairs(value, ROWS, HEADS_PADDED, CHANNELS_PADDED)
            inverse = 1 / (c * c + s * s)  # 1, but for the rounding of the tables
            even, odd = (even * c + odd * s) * inverse, (odd * c - even * s) * inverse
            value = _joined(even, odd, ROWS, HEADS_PADDED, CHANNELS_PADDED)

    # Back through weight and norm: what the row's scale has of the gradient is taken off.
    g = g * w
    if FROM_OUTPUT:
        value = value / w
    else:
        value = value * scale
        mean = tl.sum(tl.sum(g * value, 2), 1)[:, None, None] / WIDTH
    result = (g - value * mean) * scale

    line = (item * tokens + row) * WIDTH
    tl.store(out + line + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _pairs(value, ROWS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    return tl.split(tl.reshape(value, (ROWS, HEADS, CHANNELS // 2, 2)))


@triton.jit
def _joined(even, odd, ROWS: tl.constexpr, HEADS: tl.constexpr, CHANNELS: tl.constexpr):
    return tl.reshape(tl.join(even, odd), (ROWS, HEADS, CHANNELS))


@triton.jit
def _tables(cos, sin, token, tokens, CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, ACC: tl.constexpr):
    """Load cos and sin of these tokens, (ROWS, 1, pairs); 1 and 0 in the padding."""
    pair = tl.arange(0, CHANNELS_PADDED // 2)[None, None, :]
    row = token.to(tl.int64)[:, None, None]
    mask = (row < tokens) & (pair < CHANNELS // 2)
    offsets = row * (CHANNELS // 2) + pair
    return tl.load(cos + offsets, mask=mask, other=1.0).to(ACC), tl.load(sin + offsets, mask=mask, other=0.0).to(ACC)


class Blocks(NamedTuple):
    rows: int  # tokens of a program
    heads: int  # padded to a power of two
    channels: int  # likewise
    warps: int


def blocks(heads: int, channels: int) -> Blocks:
    """Choose the block of a program for so many heads of so many channels."""
    padded_heads, padded_channels = triton.next_power_of_2(heads), max(triton.next_power_of_2(channels), 2)
    token = padded_heads * padded_channels  # elements
    rows = max(ELEMENTS // token, 1)
    warps = min(max(rows * token // (32 * THREAD), 1), 16)
    return Blocks(rows, padded_heads, padded_channels, warps)


def forward(
    q: Tensor, k: Tensor | None, q_weight: Tensor, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_out: Tensor, k_out: Tensor, rstd: Tensor | None, heads: int, eps: float,
) -> None:  # fmt: skip
    """Launch ``_forward``: writes q_out and, where there is k, k_out (B, T, D), contiguous, and rstd (1 or 2, B, T)."""
    grid, shape, warps = _launch(q, k, heads)
    with torch.cuda.device_of(q):
        _forward[grid](
            q, _or(k, q), q_weight, _or(k_weight, q_weight), _or(cos, q), _or(sin, q), q_out, k_out,
            _or(rstd, q), q.shape[1], *_strides(q), *_strides(_or(k, q)),
            **shape, EPS=eps, ROTATE=cos is not None, SAVE=rstd is not None, ACC=_acc(q), num_warps=warps,
        )  # fmt: skip


def backward(
    q_grad: Tensor, k_grad: Tensor | None, q_saved: Tensor, k_saved: Tensor | None, rstd: Tensor, q_weight: Tensor,
    k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, q_out: Tensor, k_out: Tensor,
    heads: int, from_output: bool,
) -> None:  # fmt: skip
    """Launch ``_backward``: writes the gradients.  saved: the outputs with from_output, else the inputs."""
    grid, shape, warps = _launch(q_grad, k_grad, heads)
    with torch.cuda.device_of(q_grad):
        _backward[grid](
            q_grad, _or(k_grad, q_grad), q_saved, _or(k_saved, q_saved), rstd, q_weight, _or(k_weight, q_weight),
            _or(cos, q_grad), _or(sin, q_grad), q_out, k_out, q_grad.shape[1],
            *_strides(q_grad), *_strides(_or(k_grad, q_grad)), *_strides(q_saved), *_strides(_or(k_saved, q_saved)),
            **shape, ROTATE=cos is not None, FROM_OUTPUT=from_output, ACC=_acc(q_grad), num_warps=warps,
        )  # fmt: skip


def _launch(q: Tensor, k: Tensor | None, heads: int) -> tuple[tuple[int, int], dict[str, int], int]:
    """Choose the grid, the constants of the shape, and the warps."""
    batch, tokens, width = q.shape
    sources = 1 if k is None else 2
    block = blocks(heads, width // heads)
    shape = {
        "SOURCES": sources, "HEADS": heads, "CHANNELS": width // heads, "ROWS": block.rows,
        "HEADS_PADDED": block.heads, "CHANNELS_PADDED": block.channels,
    }  # fmt: skip
    return (triton.cdiv(tokens, block.rows) * sources, batch), shape, block.warps


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Stand in for a tensor that is None, with a pointer that the kernel does not follow."""
    return other if tensor is None else tensor


def _strides(x: Tensor) -> tuple[int, int]:
    """Return the strides of batch and token; 0 for a dimension of size 1: its own may be 1, compiled as a constant."""
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)


def _acc(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def builds() -> list[Build]:
    """List the builds: q and k at once and rotated, at both widths; q alone without rotation at the larger."""
    every = []
    for shape in {shape.width: shape for shape in SHAPES}.values():
        every += _builds(shape, rotate=True)
        if shape.width == 5120:
            every += _builds(shape, rotate=False)
    return every


def _builds(shape: Shape, rotate: bool) -> list[Build]:
    """List the builds of one shape: forward, and backward from the outputs and from the inputs."""
    channels = shape.width // shape.heads
    block = blocks(shape.heads, channels)
    constants = {
        "SOURCES": 1 + rotate, "HEADS": shape.heads, "CHANNELS": channels, "ROWS": block.rows,
        "HEADS_PADDED": block.heads, "CHANNELS_PADDED": block.channels, "ROTATE": rotate, "ACC": tl.float32,
    }  # fmt: skip
    directions: dict[str, tuple[Any, dict[str, Any]]] = {
        "forward": (_forward, {"EPS": 1e-6, "SAVE": True}),
        "backward from output": (_backward, {"FROM_OUTPUT": True}),
        "backward from input": (_backward, {"FROM_OUTPUT": False}),
    }

    name = f"qk_norm{'_rope' * rotate} {shape.width}"
    every = []
    for direction, (kernel, switches) in directions.items():
        signature = _signature(kernel.arg_names, constants | switches)
        aligned = tuple(argument for argument in signature if argument != "tokens")
        every.append(
            Build(f"{name} {direction}", kernel, signature, constants | switches, block.warps, aligned=aligned)
        )
    return every


def _signature(names: list[str], constants: dict[str, Any]) -> dict[str, str]:
    """Type the run-time arguments: bfloat16 tensors, float32 tables and statistics; the rest are sizes."""
    types = {name: "i32" if name == "tokens" or name.endswith(("_batch", "_row")) else "*bf16" for name in names}
    types |= dict.fromkeys(("cos", "sin", "rstd"), "*fp32")
    return {name: types[name] for name in names if name not in constants}
