"""Triton kernels of the low-rank branch: where reading the input rules the time, and no matrix product of torch fits.

``grad_a`` rebuilds its input while it loads it; ``down`` and ``up`` are the two products with dropout's mask, which
all three draw from the same Philox counters (column / 4, row of its seed), four columns a draw.  Nothing is
accumulated by atomics: ``grad_a`` writes one partial sum for every chunk of rows, and how many there are follows from
the shape alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from prfl_kernels.ahead import SHARED_LIMIT, Build
from prfl_kernels.builds import RANKS

NORMED, GELU = tl.constexpr(1), tl.constexpr(2)
KINDS = {"NoneType": 0, "Normed": 1, "Gelu": 2}
ROWS, COLUMNS = 64, 128  # of a tile of the input
RANKS_MOST = 128  # of a tile of ds
WARPS = 8
PROGRAMS = 528  # about so many are wanted at once: four for every multiprocessor of an H100


@triton.jit
def _kept(seeds, rows, in_rows, seed_rows, column, P: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS): True where the input is kept.  column: the tile's first, a multiple of 4.

    seed_rows: rows that follow each other and have one of the seeds.
    """
    fours = column // 4 + tl.arange(0, COLUMNS // 4)
    zeros = rows[:, None] * 0 + fours[None, :] * 0
    seed = tl.load(seeds + rows // seed_rows, mask=in_rows, other=0)[:, None]
    a, b, c, d = tl.philox(seed, zeros + fours[None, :], zeros + (rows % seed_rows)[:, None], zeros, zeros)
    bits = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return tl.uint_to_uniform_float(bits) >= P


@triton.jit
def _grad_a(
    ds, x, mean, rstd, scale, shift, seed, partial,
    tokens, width, rank, chunk, chunks, seed_rows,
    x_batch, x_token, scale_batch, scale_token, shift_batch, shift_token,
    KIND: tl.constexpr, PER_TOKEN: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One chunk of one sample's rows: partial[(b, chunk), rank, column] = sum over its rows of ds^T input."""
    ranks = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    first_column = tl.program_id(1) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    batch, first = part // chunks, (part % chunks) * chunk
    in_rank, in_width = ranks < rank, columns < width

    # Modulation: loaded once where all tokens share it.
    scale_row = scale + batch.to(tl.int64) * scale_batch + columns
    shift_row = shift + batch.to(tl.int64) * shift_batch + columns
    if KIND == NORMED and not PER_TOKEN:
        factor = 1 + tl.load(scale_row, mask=in_width, other=0.0).to(ACC)[None, :]
        offset = tl.load(shift_row, mask=in_width, other=0.0).to(ACC)[None, :]

    total = tl.zeros((RANKS, COLUMNS), ACC)
    for start in range(first, first + chunk, ROWS):
        token = start + tl.arange(0, ROWS)
        in_tokens = token < tokens
        inside = in_tokens[:, None] & in_width[None, :]
        row = batch.to(tl.int64) * tokens + token
        low = tl.load(ds + row[:, None] * rank + ranks[None, :], mask=in_tokens[:, None] & in_rank[None, :], other=0.0)
        x_offsets = batch.to(tl.int64) * x_batch + token.to(tl.int64)[:, None] * x_token + columns[None, :]
        value = tl.load(x + x_offsets, mask=inside, other=0.0)

        # The input is rebuilt: the modulated norm, the GELU, or as it is; then dropout's mask.
        if KIND == NORMED:
            middle = tl.load(mean + row, mask=in_tokens, other=0.0).to(ACC)[:, None]
            spread = tl.load(rstd + row, mask=in_tokens, other=0.0).to(ACC)[:, None]
            if PER_TOKEN:
                step = token.to(tl.int64)[:, None]
                factor = 1 + tl.load(scale_row[None, :] + step * scale_token, mask=inside, other=0.0).to(ACC)
                offset = tl.load(shift_row[None, :] + step * shift_token, mask=inside, other=0.0).to(ACC)
            value = (value.to(ACC) - middle) * spread * factor + offset
        if KIND == GELU:
            wide = value.to(ACC)
            power = tl.exp2(-2.302208198144325 * wide * (1 + 0.044715 * wide * wide))  # 2 sqrt(2 / pi) log2(e)
            value = wide / (1 + power)
        if P > 0:
            value = tl.where(_kept(seed, row.to(tl.int32), in_tokens, seed_rows, first_column, P, COLUMNS), value, 0.0)

        total = tl.dot(tl.trans(low), value.to(low.dtype), total, input_precision="ieee", out_dtype=ACC)

    if P > 0:
        total = total / (1 - P)
    out = partial + part.to(tl.int64) * rank * width + ranks.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out, total, mask=in_rank[:, None] & in_width[None, :])


@triton.jit
def _down(
    x, lora_a, seed, s, x_row, rows, width, rank, seed_rows,
    P: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    ranks = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rank, in_rows = ranks < rank, row < rows

    # Dropped inputs times A^T, a tile of columns at a time.
    total = tl.zeros((ROWS, RANKS), ACC)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        in_width = columns < width
        x_offsets = row.to(tl.int64)[:, None] * x_row + columns[None, :]
        value = tl.load(x + x_offsets, mask=in_rows[:, None] & in_width[None, :], other=0.0)
        value = tl.where(_kept(seed, row, in_rows, seed_rows, first, P, COLUMNS), value, 0.0)
        a_offsets = ranks[:, None] * width + columns[None, :]
        factor = tl.load(lora_a + a_offsets, mask=in_rank[:, None] & in_width[None, :], other=0.0)
        total = tl.dot(value.to(factor.dtype), tl.trans(factor), total, input_precision="ieee", out_dtype=ACC)

    out = s + row.to(tl.int64)[:, None] * rank + ranks[None, :]
    tl.store(out, total / (1 - P), mask=in_rows[:, None] & in_rank[None, :])


@triton.jit
def _up(
    dx, ds, lora_a, seed, dx_row, rows, width, rank, seed_rows,
    P: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_width, in_rows = columns < width, row < rows

    # ds A, a tile of ranks at a time.
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for first in range(0, rank, RANKS):
        ranks = first + tl.arange(0, RANKS)
        in_rank = ranks < rank
        low_offsets = row.to(tl.int64)[:, None] * rank + ranks[None, :]
        low = tl.load(ds + low_offsets, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
        a_offsets = ranks[:, None] * width + columns[None, :]
        factor = tl.load(lora_a + a_offsets, mask=in_rank[:, None] & in_width[None, :], other=0.0)
        total = tl.dot(low, factor, total, input_precision="ieee", out_dtype=ACC)

    # Dropout's mask, and added to what dx holds.
    kept = _kept(seed, row, in_rows, seed_rows, first_column, P, COLUMNS)
    total = tl.where(kept, total / (1 - P), 0.0)
    pointers = dx + row.to(tl.int64)[:, None] * dx_row + columns[None, :]
    inside = in_rows[:, None] & in_width[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0).to(ACC) + total, mask=inside)


def grad_a(
    low_grad: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    kind: str,
    seed: Tensor | None,
    dropout: float,
) -> Tensor:
    """Launch ``_grad_a``: see ``lora_linear.lora_grad_a``.  A last stride of x that is not 1 is made 1 by a copy."""
    x = x if x.dim() == 3 else x[None]
    x = x if x.stride(-1) == 1 else x.contiguous()
    low_grad = low_grad.contiguous()
    batch, tokens, width = x.shape
    rank = low_grad.shape[1]
    acc = _accumulator(low_grad)

    if scale is not None and shift is not None and mean is not None and rstd is not None:
        scale, shift = (m if m.stride(-1) == 1 else m.contiguous() for m in (scale, shift))
        scale, shift = scale.expand_as(x), shift.expand_as(x)
        mean, rstd = mean.contiguous(), rstd.contiguous()
        per_token = tokens > 1 and bool(scale.stride(1) or shift.stride(1))
        strides = (*scale.stride()[:2], *shift.stride()[:2])
    else:
        per_token, strides = False, (0, 0, 0, 0)

    block = _block(rank, low_grad.dtype, per_token)
    tiles = triton.cdiv(rank, block), triton.cdiv(width, COLUMNS)
    chunk, chunks = _chunks(batch, tokens, tiles[0] * tiles[1])
    partial = low_grad.new_empty(batch * chunks, rank, width, dtype=acc)

    unused = low_grad  # a pointer that the kernel does not follow
    optional = [unused if tensor is None else tensor for tensor in (mean, rstd, scale, shift, seed)]
    with torch.cuda.device_of(x):
        _grad_a[(*tiles, batch * chunks)](
            low_grad, x, *optional, partial,
            tokens, width, rank, chunk, chunks, _seed_rows(batch * tokens, seed),
            *x.stride()[:2], *strides,
            KIND=KINDS[kind], PER_TOKEN=per_token, P=dropout, ACC=_TRITON[acc],
            ROWS=ROWS, COLUMNS=COLUMNS, RANKS=block, num_warps=WARPS, num_stages=_stages(low_grad.dtype, per_token),
        )  # fmt: skip
    return partial.sum(0)


def down(x: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Launch ``_down``: see ``lora_linear.lora_down``.  x may have rows apart; a copy makes other strides 1."""
    (rows, width), rank = x.shape, len(lora_a)
    x = x if x.stride(1) == 1 else x.contiguous()
    lora_a = lora_a.contiguous()
    s = x.new_empty(rows, rank)
    block = _block(rank, x.dtype)

    with torch.cuda.device_of(x):
        _down[(triton.cdiv(rank, block), triton.cdiv(rows, ROWS))](
            x, lora_a, seed, s, x.stride(0), rows, width, rank, _seed_rows(rows, seed),
            P=dropout, ACC=_TRITON[_accumulator(x)], ROWS=ROWS, COLUMNS=COLUMNS, RANKS=block,
            num_warps=WARPS, num_stages=_down_stages(x.dtype, block, _shared(x)),
        )  # fmt: skip
    return s


def up(grad_x: Tensor, low_grad: Tensor, lora_a: Tensor, seed: Tensor, dropout: float) -> None:
    """Launch ``_up``: see ``lora_linear.lora_up_``."""
    if grad_x.stride(1) != 1:
        raise ValueError("the columns of grad_x must lie side by side: it is written in place")
    (rows, width), rank = grad_x.shape, len(lora_a)
    low_grad, lora_a = low_grad.contiguous(), lora_a.contiguous()
    block = min(_block(rank, grad_x.dtype), 64)

    with torch.cuda.device_of(grad_x):
        _up[(triton.cdiv(width, COLUMNS), triton.cdiv(rows, ROWS))](
            grad_x, low_grad, lora_a, seed, grad_x.stride(0), rows, width, rank, _seed_rows(rows, seed),
            P=dropout, ACC=_TRITON[_accumulator(grad_x)], ROWS=ROWS, COLUMNS=COLUMNS, RANKS=block,
            num_warps=WARPS, num_stages=_stages(grad_x.dtype),
        )  # fmt: skip


_TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def _seed_rows(rows: int, seed: Tensor | None) -> int:
    return rows if seed is None else rows // seed.numel()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _block(rank: int, dtype: torch.dtype, per_token: bool = False) -> int:
    """Choose the ranks of a tile: 16 is the least that ``tl.dot`` takes.

    Wide types would not fit into shared memory, nor a modulation of every token into the registers of an A100.
    """
    if dtype.itemsize > 2:
        most = 32
    else:
        most = 64 if per_token else RANKS_MOST
    return min(max(triton.next_power_of_2(rank), 16), most)


def _stages(dtype: torch.dtype, per_token: bool = False) -> int:
    """Choose how many tiles are on their way at once, as far as registers and shared memory go (``builds``)."""
    if dtype.itemsize > 2:
        return 1
    return 2 if per_token else 3


def _down_stages(dtype: torch.dtype, block: int, shared: int) -> int:
    """Choose the stages of ``_down``, whose tiles are the largest, for a GPU with so many bytes of shared memory."""
    return min(_stages(dtype), shared // ((ROWS + block) * COLUMNS * dtype.itemsize))


def _shared(x: Tensor) -> int:
    """Return the bytes of shared memory that a block may have: 99 KB on small cards, 163 or 227 on large ones."""
    if not x.is_cuda:  # interpreted: Hopper's
        return SHARED_LIMIT[90]
    properties: Any = torch.cuda.get_device_properties(x.device)  # torch's types lack it
    return properties.shared_memory_per_block_optin


def _chunks(batch: int, tokens: int, tiles: int) -> tuple[int, int]:
    """Choose the rows of a chunk, a multiple of ROWS, and the number of chunks of a sample.

    They follow from the shape alone, so that the sums are added in one order whatever the device.
    """
    wanted = max(1, PROGRAMS // (tiles * batch))
    chunk = triton.cdiv(triton.cdiv(tokens, wanted), ROWS) * ROWS
    return chunk, triton.cdiv(tokens, chunk)


def builds(shared: int) -> list[Build]:
    """List the builds.  Widths change run-time arguments only, and ranks beyond 128 only the number of tiles.

    shared: bytes of shared memory that a block may have.
    """
    grad_a_builds = []
    for rank in RANKS:
        grad_a_builds += [_grad_a_build(rank, "Normed"), _grad_a_build(rank, "Gelu")]
    grad_a_builds += [
        _grad_a_build(128, "Normed", per_token=True),
        _grad_a_build(128, "Normed", dropout=0.05),
        _grad_a_build(128, "NoneType", dropout=0.05),
    ]

    down = {"x": "*bf16", "lora_a": "*bf16", "seed": "*i64", "s": "*bf16"}
    up = {"dx": "*bf16", "ds": "*bf16", "lora_a": "*bf16", "seed": "*i64"}
    stages = _down_stages(torch.bfloat16, 128, shared)
    return [
        *grad_a_builds,
        replace(_build("lora_down r128", _down, down, 128, (ROWS, 128, COLUMNS)), num_stages=stages),
        _build("lora_up", _up, up, 64, (ROWS, COLUMNS, 64)),
    ]


def _grad_a_build(rank: int, kind: str, per_token: bool = False, dropout: float = 0.0) -> Build:
    pointers = {"ds": "*bf16", "x": "*bf16", "partial": "*fp32", "seed": "*i64" if dropout else "*bf16"}
    pointers |= dict.fromkeys(("mean", "rstd", "scale", "shift"), "*fp32" if kind == "Normed" else "*bf16")
    name = f"lora_grad_a {kind} r{rank}" + " per token" * per_token + " dropout" * bool(dropout)
    matrix = _block(rank, torch.bfloat16, per_token), COLUMNS, ROWS
    switches = {"KIND": KINDS[kind], "PER_TOKEN": per_token}
    return _build(name, _grad_a, pointers, rank, matrix, dropout, per_token, switches)


def _build(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    rank: int,
    matrix: tuple[int, int, int],
    dropout: float = 0.05,
    per_token: bool = False,
    switches: Mapping[str, Any] = MappingProxyType({}),
) -> Build:
    constants = {**switches, "P": dropout, "ACC": tl.float32, "ROWS": ROWS, "COLUMNS": COLUMNS}
    constants["RANKS"] = _block(rank, torch.bfloat16, per_token)

    numbers = {name: "i32" for name in kernel.arg_names if name not in constants and name not in pointers}
    any_number = ("tokens", "rows", "chunks", "seed_rows")  # not always multiples of 16
    aligned = tuple(name for name in (*pointers, *numbers) if name not in any_number)

    stages = _stages(torch.bfloat16, per_token)
    spill = 16 if per_token else 0  # on sm_120 by Triton 3.9 alone
    return Build(name, kernel, {**pointers, **numbers}, constants, WARPS, stages, aligned, spill, (matrix,))
