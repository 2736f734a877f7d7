"""Triton sources of attention: flash attention's forward pass (arXiv 2205.14135, 2307.08691), and a backward pass in
two kernels, one that owns queries and one that owns keys, so that nothing is added by atomics and every run gives the
same bits.

A program takes a tile of queries (or keys) of one head and goes over all keys (queries).  Scores are in powers of two.
Rows lie where their strides say; the channels of a head are side by side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = (16, 32, 64, 128)  # of a head
PROGRAMS = 264  # two for each multiprocessor of an H200; no property of the device, so that bits do not depend on it
SHARE = 1024  # queries of a share at least


@triton.jit
def _tile(pointer, rows, stride, channel, left, MASKED: tl.constexpr):
    """(rows, channels) from pointer on, zero where ``left`` rows are over.  Only within a tile do offsets have 32 bits;
    its start is a pointer that was moved in 64."""
    places = pointer + (rows[:, None] * stride + channel[None, :])
    if MASKED:
        return tl.load(places, mask=rows[:, None] < left, other=0.0)
    return tl.load(places)


@triton.jit
def _scores(q, k, bias, row, tokens, SCALE: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
            ACC: tl.constexpr, PRECISION: tl.constexpr, FOLDED: tl.constexpr):  # fmt: skip
    """Base-two logits (queries, keys), or with FOLDED the bare products; row: the keys' numbers."""
    LOG2E: tl.constexpr = 1.4426950408889634
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
    if not FOLDED:
        scores *= SCALE * LOG2E
    if BIAS:
        if RAGGED:
            offset = tl.load(bias + row, mask=row < tokens, other=0.0)
        else:
            offset = tl.load(bias + row)
        scores += (offset.to(ACC) * LOG2E)[None, :]
    if RAGGED:
        scores = tl.where((row < tokens)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q, result, total, best, key, value, bias, first, last, tokens, k_row, v_row,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Products are scaled in the exponent, by the instruction that subtracts the largest; which a scale above 0 keeps.
    FOLDED: tl.constexpr = SCALE > 0 and not BIAS
    FACTOR: tl.constexpr = SCALE * 1.4426950408889634 if FOLDED else 1.0
    rows, channel = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    for start in tl.range(first, last, KEYS, num_stages=1 if RAGGED else None):  # the tail is one tile at most
        row = start + rows
        k = _tile(key + tl.cast(start, tl.int64) * k_row, rows, k_row, channel, tokens - start, RAGGED)
        scores = _scores(q, k, bias, row, tokens, SCALE, BIAS, RAGGED, ACC, PRECISION, FOLDED)

        # What was added up so far shrinks where a larger logit comes.
        higher = tl.maximum(best, tl.max(scores, 1) * FACTOR)
        shift = higher
        if BIAS:  # a tile of keys may be masked as a whole
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * FACTOR - shift[:, None])
        decay = tl.exp2(best - shift)
        total = total * decay + tl.sum(weights, 1)

        v = _tile(value + tl.cast(start, tl.int64) * v_row, rows, v_row, channel, tokens - start, RAGGED)
        result = tl.dot(weights.to(v.dtype), v, result * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
        best = higher
    return result, total, best


@triton.jit
def _forward(
    query, key, value, bias, out, lse, heads, query_tokens, key_tokens,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * QUERIES
    rows, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    row = begin + rows
    query += batch * q_batch + head * q_head + begin * q_row
    q = _tile(query, rows, q_row, channel, query_tokens - begin, True)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    bias += batch * key_tokens

    # The softmax is added up, tile by tile.
    best = tl.full([QUERIES], float("-inf"), ACC)
    total = tl.zeros([QUERIES], ACC)
    result = tl.zeros([QUERIES, CHANNELS], ACC)
    whole = key_tokens // KEYS * KEYS
    result, total, best = _attend(
        q, result, total, best, key, value, bias, 0, whole, key_tokens, k_row, v_row,
        SCALE, CHANNELS, KEYS, BIAS, False, ACC, PRECISION,
    )  # fmt: skip
    result, total, best = _attend(
        q, result, total, best, key, value, bias, whole, key_tokens, key_tokens, k_row, v_row,
        SCALE, CHANNELS, KEYS, BIAS, True, ACC, PRECISION,
    )  # fmt: skip

    line = (batch * query_tokens + row) * heads + head
    inside = row < query_tokens
    result = result / total[:, None]
    places = out + line[:, None] * CHANNELS + channel[None, :]
    tl.store(places, result.to(out.dtype.element_ty), mask=inside[:, None])
    if SAVE:
        LN2: tl.constexpr = 0.6931471805599453
        tl.store(lse + (batch * heads + head) * query_tokens + row, best * LN2 + tl.log(total), mask=inside)


@triton.jit
def _add_query_gradient(
    q, grad, lse, delta, result, key, value, bias, first, last, tokens, k_row, v_row,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows, channel = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    for start in tl.range(first, last, KEYS, num_stages=1 if RAGGED else None):  # the tail is one tile at most
        row = start + rows
        k = _tile(key + tl.cast(start, tl.int64) * k_row, rows, k_row, channel, tokens - start, RAGGED)
        v = _tile(value + tl.cast(start, tl.int64) * v_row, rows, v_row, channel, tokens - start, RAGGED)
        scores = _scores(q, k, bias, row, tokens, SCALE, BIAS, RAGGED, ACC, PRECISION, False)
        weights = tl.exp2(scores - lse[:, None])
        d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
        d_scores = weights * (d_weights - delta[:, None])
        result = tl.dot(d_scores.to(k.dtype), k, result, input_precision=PRECISION, out_dtype=ACC)
    return result


@triton.jit
def _query_gradient(
    query, key, value, bias, out, lse, grad, delta, d_query, heads, query_tokens, key_tokens,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum(out dout), which the keys' kernel takes."""
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * QUERIES
    rows, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    row = begin + rows
    inside = row < query_tokens
    query += batch * q_batch + head * q_head + begin * q_row
    q = _tile(query, rows, q_row, channel, query_tokens - begin, True)
    grad += batch * g_batch + head * g_head + begin * g_row
    g = _tile(grad, rows, g_row, channel, query_tokens - begin, True)

    # delta, by rows of out and of its gradient.
    line = (batch * query_tokens + row) * heads + head
    places = line[:, None] * CHANNELS + channel[None, :]
    o = tl.load(out + places, mask=inside[:, None], other=0.0)
    product = tl.sum(o.to(ACC) * g.to(ACC), 1)
    number = (batch * heads + head) * query_tokens + row
    tl.store(delta + number, product, mask=inside)
    logarithm = tl.load(lse + number, mask=inside, other=0.0) * LOG2E

    # dq, added up over the tiles of keys.
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head
    bias += batch * key_tokens
    result = tl.zeros([QUERIES, CHANNELS], ACC)
    whole = key_tokens // KEYS * KEYS
    result = _add_query_gradient(
        q, g, logarithm, product, result, key, value, bias, 0, whole, key_tokens, k_row, v_row,
        SCALE, CHANNELS, KEYS, BIAS, False, ACC, PRECISION,
    )  # fmt: skip
    result = _add_query_gradient(
        q, g, logarithm, product, result, key, value, bias, whole, key_tokens, key_tokens, k_row, v_row,
        SCALE, CHANNELS, KEYS, BIAS, True, ACC, PRECISION,
    )  # fmt: skip
    tl.store(d_query + places, (result * SCALE).to(d_query.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _add_key_gradient(
    k, v, offset, d_k, d_v, query, grad, lse, delta, first, last, tokens, q_row, g_row,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    rows, channel = tl.arange(0, QUERIES), tl.arange(0, CHANNELS)
    for start in tl.range(first, last, QUERIES, num_stages=1 if RAGGED else None):  # the tail is one tile at most
        row = start + rows
        q = _tile(query + tl.cast(start, tl.int64) * q_row, rows, q_row, channel, tokens - start, RAGGED)
        g = _tile(grad + tl.cast(start, tl.int64) * g_row, rows, g_row, channel, tokens - start, RAGGED)
        if RAGGED:  # queries beyond the last have no weight
            logarithm = tl.load(lse + row, mask=row < tokens, other=float("inf"))
            product = tl.load(delta + row, mask=row < tokens, other=0.0)
        else:
            logarithm, product = tl.load(lse + row), tl.load(delta + row)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * (SCALE * LOG2E)
        if BIAS:
            scores += offset[:, None]
        weights = tl.exp2(scores - (logarithm * LOG2E)[None, :])
        d_v = tl.dot(weights.to(g.dtype), g, d_v, input_precision=PRECISION, out_dtype=ACC)
        d_weights = tl.dot(v, tl.trans(g), input_precision=PRECISION, out_dtype=ACC)
        d_scores = weights * (d_weights - product[None, :])
        d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION, out_dtype=ACC)
    return d_k, d_v


@triton.jit
def _key_gradient(
    query, key, value, bias, lse, grad, delta, d_key, d_value, heads, query_tokens, key_tokens,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head,
    SCALE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BIAS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, or, where the third axis of the grid has more than one program, that many parts of them: each of one
    share of the queries.  Keys beyond the last compute what is not stored."""
    LOG2E: tl.constexpr = 1.4426950408889634
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * KEYS
    rows, channel = tl.arange(0, KEYS), tl.arange(0, CHANNELS)
    row = begin + rows
    inside = row < key_tokens
    key += batch * k_batch + head * k_head + begin * k_row
    value += batch * v_batch + head * v_head + begin * v_row
    k = _tile(key, rows, k_row, channel, key_tokens - begin, True)
    v = _tile(value, rows, v_row, channel, key_tokens - begin, True)

    query += batch * q_batch + head * q_head
    grad += batch * g_batch + head * g_head
    lse += (batch * heads + head) * query_tokens
    delta += (batch * heads + head) * query_tokens
    if BIAS:
        offset = tl.load(bias + batch * key_tokens + row, mask=inside, other=0.0).to(ACC) * LOG2E
    else:
        offset = 0.0
    d_k = tl.zeros([KEYS, CHANNELS], ACC)
    d_v = tl.zeros([KEYS, CHANNELS], ACC)

    # This program's share of the queries.
    part, parts = tl.program_id(2), tl.num_programs(2)
    share = tl.cdiv(tl.cdiv(query_tokens, QUERIES), parts) * QUERIES
    first = part * share
    last = tl.minimum(first + share, query_tokens)
    whole = first + (last - first) // QUERIES * QUERIES
    d_k, d_v = _add_key_gradient(
        k, v, offset, d_k, d_v, query, grad, lse, delta, first, whole, query_tokens, q_row, g_row,
        SCALE, CHANNELS, QUERIES, BIAS, False, ACC, PRECISION,
    )  # fmt: skip
    d_k, d_v = _add_key_gradient(
        k, v, offset, d_k, d_v, query, grad, lse, delta, whole, last, query_tokens, q_row, g_row,
        SCALE, CHANNELS, QUERIES, BIAS, True, ACC, PRECISION,
    )  # fmt: skip

    batch += part * (tl.num_programs(1) // heads)
    places = ((batch * key_tokens + row) * heads + head)[:, None] * CHANNELS + channel[None, :]
    tl.store(d_key + places, (d_k * SCALE).to(d_key.dtype.element_ty), mask=inside[:, None])
    tl.store(d_value + places, d_v.to(d_value.dtype.element_ty), mask=inside[:, None])


class Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


# In half precision, by the major number of a GPU's compute capability: without a spill by Triton 3.6 and 3.9, and no
# product computed twice (bench/results/compiled_kernels.json).  Hopper's warpgroups take 64 rows each, so that eight
# warps over 64 queries would compute the same tile twice; Ampere spills at 128 queries.  Those of 8 and 12 fit into the
# 99 KB of shared memory that their smaller cards have.
HALF_TILES: dict[int, dict[Any, Tiles]] = {
    8: {
        _forward: Tiles(128, 64, 8, 3),
        _query_gradient: Tiles(64, 64, 8, 2),
        _key_gradient: Tiles(64, 64, 8, 2),
    },
    9: {
        _forward: Tiles(128, 128, 8, 2),
        _query_gradient: Tiles(128, 64, 8, 2),
        _key_gradient: Tiles(32, 128, 8, 2),
    },
    10: {
        _forward: Tiles(128, 128, 8, 2),
        _query_gradient: Tiles(128, 64, 8, 2),
        _key_gradient: Tiles(64, 128, 8, 2),
    },
    12: {
        _forward: Tiles(128, 32, 8, 3),
        _query_gradient: Tiles(64, 64, 8, 2),
        _key_gradient: Tiles(64, 64, 8, 2),
    },
}
# Up to 64 channels eight warps of these would compute 64 rows twice, too.
NARROW_TILES = {
    major: HALF_TILES[major] | {_query_gradient: Tiles(64, 64, 4, 2), _key_gradient: Tiles(32, 128, 8, 2)}
    for major in (8, 12)
}
# float32 has no tensor cores here: it stays exact.
FULL_TILES = {
    _forward: Tiles(16, 32, 8, 1),
    _query_gradient: Tiles(32, 32, 16, 1),
    _key_gradient: Tiles(16, 32, 8, 1),
}


def tiles(kernel: Any, itemsize: int, channels: int, major: int) -> Tiles:
    """Of a GPU that is not in the table, Ampere's."""
    if itemsize > 2:
        return FULL_TILES[kernel]
    table = HALF_TILES if channels > 64 else HALF_TILES | NARROW_TILES
    return table.get(major, table[8])[kernel]


def _tiles(kernel: Any, query: Tensor) -> Tiles:
    major = torch.cuda.get_device_capability(query.device)[0] if query.is_cuda else 9  # interpreted: Hopper's
    return tiles(kernel, query.element_size(), query.shape[-1], major)


def parts(programs: int, query_tokens: int) -> int:
    """Into how many shares the queries are cut where there are too few keys (text) to keep a GPU busy."""
    return max(1, min(PROGRAMS // programs, query_tokens // SHARE))


def forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor | None, scale: float
) -> None:
    """Fills out and, unless it is None, lse."""
    pointers = (query, key, value, query if bias is None else bias, out, out if lse is None else lse)
    sizes = _tiles(_forward, query)
    grid = (triton.cdiv(query.shape[1], sizes.queries), query.shape[0] * query.shape[2])
    _launch(_forward, grid, sizes, pointers, (query, key, value), scale, bias, SAVE=lse is not None)


def query_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    d_query: Tensor, delta: Tensor, scale: float,
) -> None:  # fmt: skip
    """Fills d_query and delta."""
    pointers = (query, key, value, query if bias is None else bias, out, lse, grad, delta, d_query)
    sizes = _tiles(_query_gradient, query)
    grid = (triton.cdiv(query.shape[1], sizes.queries), query.shape[0] * query.shape[2])
    _launch(_query_gradient, grid, sizes, pointers, (query, key, value, grad), scale, bias)


def key_gradient(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor,
    d_key: Tensor, d_value: Tensor, scale: float,
) -> None:  # fmt: skip
    """Fills d_key and d_value."""
    sizes = _tiles(_key_gradient, query)
    programs = triton.cdiv(key.shape[1], sizes.keys), query.shape[0] * query.shape[2]
    count = parts(math.prod(programs), query.shape[1])
    results = (d_key, d_value) if count == 1 else delta.new_empty(2, count, *key.shape)
    pointers = (query, key, value, query if bias is None else bias, lse, grad, delta, *results)
    _launch(_key_gradient, (*programs, count), sizes, pointers, (query, key, value, grad), scale, bias)
    if count > 1:
        d_key.copy_(results[0].sum(0))  # sum(out=) would round the shares before it adds them
        d_value.copy_(results[1].sum(0))


def _launch(
    kernel: Any, grid: tuple[int, ...], sizes: Tiles, pointers: tuple[Tensor, ...], strided: tuple[Tensor, ...],
    scale: float, bias: Tensor | None, **more: Any,
) -> None:  # fmt: skip
    query, key = strided[:2]
    if query.shape[-1] not in CHANNELS:
        raise ValueError(f"heads of {query.shape[-1]} channels: the kernel takes {', '.join(map(str, CHANNELS))}")
    strides = [stride for x in strided for stride in x.stride()[:3]]
    if max(x.stride(1) for x in strided) * max(sizes.queries, sizes.keys) >= 2**31:
        raise ValueError("rows lie so far apart that 32 bits do not count the places of a tile: make them contiguous")
    constants = _constants(query.dtype, query.shape[-1], sizes, scale, bias is not None) | more
    with torch.cuda.device_of(query):
        kernel[grid](
            *pointers, query.shape[2], query.shape[1], key.shape[1], *strides,
            **constants, num_warps=sizes.warps, num_stages=sizes.stages,
        )  # fmt: skip


def _constants(dtype: torch.dtype, channels: int, sizes: Tiles, scale: float, bias: bool) -> dict[str, Any]:
    return dict(
        SCALE=scale,
        CHANNELS=channels,
        QUERIES=sizes.queries,
        KEYS=sizes.keys,
        BIAS=bias,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        PRECISION="ieee" if dtype == torch.float32 else "tf32",  # of half precision there is one
    )
