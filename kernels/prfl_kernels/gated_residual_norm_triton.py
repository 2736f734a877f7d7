"""Triton sources of gate + residual + LayerNorm + modulate: a program takes a token's row, or a run of rows.

All of it is memory traffic, so every row is read once and written once.  Modulation that a whole video shares is read
again for every row; it is small and stays in the cache.  Last dimensions are contiguous, all else goes by strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prfl_kernels.ahead import Build
from prfl_kernels.builds import SHAPES

ROWS = 1  # tokens of a program of the backward pass, where nothing is summed over tokens
PROGRAMS = 1024  # about: where gradients are summed over tokens, so many partial sums at most


@triton.jit
def row_offset(b, t, stride_b, stride_t):
    """In 64 bits: Wan 2.2's (B, T, 6, D) modulation passes 2^31 elements at B = 1."""
    return b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t


@triton.jit
def forward_kernel(
    x, y, gate, scale, shift, total, normed, mean, rstd, tokens,
    x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t, shift_b, shift_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """total = x + gate y, normed = (1 + scale) LayerNorm(total) + shift; without y, gate or normed the shorter form."""
    t, b = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = row_offset(b, t, tokens, 1)
    value = tl.load(x + row_offset(b, t, x_b, x_t) + column, mask=inside, other=0.0).to(ACC)

    # The gated sum.
    if y is not None:
        addend = tl.load(y + row_offset(b, t, y_b, y_t) + column, mask=inside, other=0.0).to(ACC)
        if gate is not None:
            addend *= tl.load(gate + row_offset(b, t, gate_b, gate_t) + column, mask=inside, other=0.0).to(ACC)
        rounded = (value + addend).to(total.dtype.element_ty)  # what the next operation reads, so it is what is normed
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        value = rounded.to(ACC)

    # LayerNorm of it, modulated; mean and 1 / deviation are kept for the backward pass.
    if normed is not None:
        centre = tl.sum(value, 0) / WIDTH
        centred = tl.where(inside, value - centre, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)
        factor = 1.0 + tl.load(scale + row_offset(b, t, scale_b, scale_t) + column, mask=inside, other=0.0).to(ACC)
        offset = tl.load(shift + row_offset(b, t, shift_b, shift_t) + column, mask=inside, other=0.0).to(ACC)
        out = (centred * inverse * factor + offset).to(normed.dtype.element_ty)
        tl.store(normed + row * WIDTH + column, out, mask=inside)
        tl.store(mean + row, centre)
        tl.store(rstd + row, inverse)


@triton.jit
def backward_kernel(
    d_total, d_normed, x, mean, rstd, y, gate, scale, dx, dy, d_gate, d_scale, d_shift, tokens,
    d_total_b, d_total_t, d_normed_b, d_normed_t, x_b, x_t, y_b, y_t, gate_b, gate_t, scale_b, scale_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr, SCALE_PER_TOKEN: tl.constexpr, SHIFT_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """dx = d_total + the norm's, dy = gate dx, and those gradients of the modulation that have somewhere to go.

    ROWS consecutive tokens of a video per program.  A gradient that tokens share is summed over them in order; the
    program writes its partial sum to row (b, program), and the caller adds those up: the same sum in every run.
    """
    program, b = tl.program_id(0), tl.program_id(1)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    gate_sum = tl.zeros([BLOCK], ACC)
    scale_sum = tl.zeros([BLOCK], ACC)
    shift_sum = tl.zeros([BLOCK], ACC)

    for i in range(ROWS):
        t = program * ROWS + i
        present = t < tokens
        inside = column < tl.where(present, WIDTH, 0)  # the interpreter spoils a mask that meets a scalar by &
        row = row_offset(b, t, tokens, 1)

        # What comes from the sum itself.
        gradient = tl.zeros([BLOCK], ACC)
        if d_total is not None:
            here = d_total + row_offset(b, t, d_total_b, d_total_t) + column
            gradient += tl.load(here, mask=inside, other=0.0).to(ACC)

        # What comes through the norm, and the gradients of its modulation.
        if d_normed is not None:
            here = d_normed + row_offset(b, t, d_normed_b, d_normed_t) + column
            outer = tl.load(here, mask=inside, other=0.0).to(ACC)
            value = tl.load(x + row_offset(b, t, x_b, x_t) + column, mask=inside, other=0.0).to(ACC)
            inverse = tl.load(rstd + row, mask=present, other=0.0)
            normed = (value - tl.load(mean + row, mask=present, other=0.0)) * inverse
            factor = 1.0 + tl.load(scale + row_offset(b, t, scale_b, scale_t) + column, mask=inside, other=0.0).to(ACC)
            inner = outer * factor  # 0 where nothing is, so that both sums run over WIDTH elements
            gradient += inverse * (inner - tl.sum(inner, 0) / WIDTH - normed * (tl.sum(inner * normed, 0) / WIDTH))
            tl.store(dx + row * WIDTH + column, gradient.to(dx.dtype.element_ty), mask=inside)
            if d_scale is not None:
                if SCALE_PER_TOKEN:
                    tl.store(d_scale + row * WIDTH + column, outer * normed, mask=inside)
                else:
                    scale_sum += outer * normed
            if d_shift is not None:
                if SHIFT_PER_TOKEN:
                    tl.store(d_shift + row * WIDTH + column, outer, mask=inside)
                else:
                    shift_sum += outer

        # On to y, and to its gate.
        if gate is not None:
            factor = tl.load(gate + row_offset(b, t, gate_b, gate_t) + column, mask=inside, other=0.0).to(ACC)
            tl.store(dy + row * WIDTH + column, (factor * gradient).to(dy.dtype.element_ty), mask=inside)
        if d_gate is not None:
            here = y + row_offset(b, t, y_b, y_t) + column
            product = gradient * tl.load(here, mask=inside, other=0.0).to(ACC)
            if GATE_PER_TOKEN:
                tl.store(d_gate + row * WIDTH + column, product, mask=inside)
            else:
                gate_sum += product

    # Partial sums of the modulation that tokens share.
    part = row_offset(b, program, programs, 1) * WIDTH + column
    if d_gate is not None:
        if not GATE_PER_TOKEN:
            tl.store(d_gate + part, gate_sum, mask=column < WIDTH)
    if d_scale is not None:
        if not SCALE_PER_TOKEN:
            tl.store(d_scale + part, scale_sum, mask=column < WIDTH)
    if d_shift is not None:
        if not SHIFT_PER_TOKEN:
            tl.store(d_shift + part, shift_sum, mask=column < WIDTH)


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, modulation: tuple[Tensor, Tensor] | None, eps: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the forward pass: total (None without y), normed, mean and rstd (None without modulation).

    modulation: scale and shift.
    """
    (batch, tokens, width), wide = x.shape, torch.promote_types(x.dtype, torch.float32)
    x, y, gate, scale, shift = (_rows(each, x.shape) for each in (x, y, gate, *(modulation or (None, None))))
    total = None if y is None else x.new_empty(x.shape)
    normed = mean = rstd = None
    if modulation is not None:
        normed = x.new_empty(x.shape)
        mean, rstd = (x.new_empty(batch, tokens, dtype=wide) for _ in range(2))

    with torch.cuda.device_of(x):
        forward_kernel[(tokens, batch)](
            x, y, gate, scale, shift, total, normed, mean, rstd, tokens,
            *_strides(x, y, gate, scale, shift), width, _block(width), eps, _accumulate(wide), num_warps=_warps(width),
        )  # fmt: skip
    return total, normed, mean, rstd


def backward(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    x: Tensor | None,
    statistics: tuple[Tensor, Tensor] | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    per_token: Sequence[bool | None],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Launch the backward pass: dx (None without d_normed), dy (None without gate), gradients of gate, scale, shift.

    per_token: for gate, scale and shift: whether every token has its own, or None where no gradient is wanted.  They
    come as (B, T, D), or summed over tokens as (B, 1, D), in float32 (float64 for float64).
    """
    like = d_total if d_normed is None else d_normed
    assert like is not None
    (batch, tokens, width), wide = like.shape, torch.promote_types(like.dtype, torch.float32)

    # Where a gradient is summed over tokens, a program takes so many rows that about PROGRAMS partial sums are left.
    summing = False in per_token
    rows = triton.next_power_of_2(triton.cdiv(batch * tokens, PROGRAMS)) if summing else ROWS
    programs = triton.cdiv(tokens, rows)

    inputs = [_rows(tensor, like.shape) for tensor in (d_total, d_normed, x, y, gate, scale)]
    d_total, d_normed, x, y, gate, scale = inputs
    mean, rstd = statistics or (None, None)

    dx = None if d_normed is None else like.new_empty(like.shape)
    dy = None if gate is None else like.new_empty(like.shape)
    parts: list[Tensor | None] = []
    for each_token in per_token:
        count = tokens if each_token else programs
        parts.append(None if each_token is None else like.new_empty(batch, count, width, dtype=wide))

    with torch.cuda.device_of(like):
        backward_kernel[(programs, batch)](
            d_total, d_normed, x, mean, rstd, y, gate, scale, dx, dy, *parts, tokens, *_strides(*inputs),
            width, _block(width), rows, _accumulate(wide), *map(bool, per_token), num_warps=_warps(width, summing),
        )  # fmt: skip

    for i, part in enumerate(parts):
        if part is not None and not per_token[i]:
            parts[i] = part.sum(1, keepdim=True)
    return dx, dy, parts


def _rows(tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    """View a tensor as (B, T, D), without a copy unless its last dimension is not contiguous."""
    if tensor is None:
        return None
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).expand(shape)


def _strides(*tensors: Tensor | None) -> list[int]:
    """List the strides of batch and token of every tensor; zeros for one that is None."""
    strides: list[int] = []
    for tensor in tensors:
        strides += (0, 0) if tensor is None else tensor.stride()[:2]
    return strides


def _block(width: int) -> int:
    return triton.next_power_of_2(width)


def _warps(width: int, summing: bool = False) -> int:
    """The fewest without a spill, so that most programs share a processor; three running sums ask for twice as many."""
    return min(16, max(4, _block(width) // 1024)) * (2 if summing else 1)


def _accumulate(wide: torch.dtype) -> tl.dtype:
    return tl.float64 if wide == torch.float64 else tl.float32


def builds() -> list[Build]:
    """List the builds: bfloat16 with float32 modulation, for both widths, without and with gradients of it."""
    every = []
    for width in dict.fromkeys(shape.width for shape in SHAPES):
        every += [
            _forward_build(width),
            _backward_build("backward", width, gradients=False),
            _backward_build("backward, modulation shared", width, gradients=True, rows=32),
            _backward_build("backward, modulation per token", width, gradients=True, per_token=True),
        ]
    return every


def _forward_build(width: int) -> Build:
    pointers = dict(x="*bf16", y="*bf16", gate="*fp32", scale="*fp32", shift="*fp32", total="*bf16", normed="*bf16")
    pointers |= dict(mean="*fp32", rstd="*fp32")
    strides = [f"{name}_{axis}" for name in ("x", "y", "gate", "scale", "shift") for axis in "bt"]
    constants = dict(WIDTH=width, BLOCK=_block(width), EPS=1e-6, ACC=tl.float32)
    return _build("forward", forward_kernel, width, pointers, strides, constants)


def _backward_build(name: str, width: int, gradients: bool, rows: int = 1, per_token: bool = False) -> Build:
    pointers = dict(d_total="*bf16", d_normed="*bf16", x="*bf16", mean="*fp32", rstd="*fp32", gate="*fp32")
    pointers |= dict(scale="*fp32", dx="*bf16", dy="*bf16")
    wanted = dict(y="*bf16", d_gate="*fp32", d_scale="*fp32", d_shift="*fp32")
    constants: dict = dict(WIDTH=width, BLOCK=_block(width), ROWS=rows, ACC=tl.float32)
    constants |= dict.fromkeys(("GATE_PER_TOKEN", "SCALE_PER_TOKEN", "SHIFT_PER_TOKEN"), per_token)
    if gradients:
        pointers |= wanted
    else:
        constants |= dict.fromkeys(wanted)
    strides = [f"{name}_{axis}" for name in ("d_total", "d_normed", "x", "y", "gate", "scale") for axis in "bt"]
    return _build(name, backward_kernel, width, pointers, strides, constants, summing=rows > 1)


def _build(
    name: str,
    kernel: Any,
    width: int,
    pointers: dict[str, str],
    strides: list[str],
    constants: dict[str, Any],
    summing: bool = False,
) -> Build:
    signature = pointers | dict.fromkeys(strides, "i64") | dict(tokens="i32")
    name, aligned = f"gated_residual_norm {name}, {width}", (*pointers, *strides)
    return Build(name, kernel, signature, constants, _warps(width, summing), aligned=aligned)
