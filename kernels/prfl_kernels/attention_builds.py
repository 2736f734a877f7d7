"""Attention's kernels as they are launched for Wan's heads: what is compiled ahead."""

from __future__ import annotations

from typing import Any

import torch

from prfl_kernels import attention_triton
from prfl_kernels.ahead import Build
from prfl_kernels.attention_triton import Tiles, _constants, _forward, _key_gradient, _query_gradient


def builds(major: int) -> list[Build]:
    """List the builds.  Wan's heads have 128 channels; a bias, which text may have, takes some registers more."""
    half, full = torch.bfloat16, torch.float32
    return [
        _build("forward, no gradient", _forward, half, 128, major, SAVE=False),
        _build("forward", _forward, half, 128, major, SAVE=True),
        _build("forward", _forward, half, 128, major, bias=True, SAVE=True),
        _build("query gradient", _query_gradient, half, 128, major),
        _build("query gradient", _query_gradient, half, 128, major, bias=True),
        _build("key gradient", _key_gradient, half, 128, major),
        _build("key gradient", _key_gradient, half, 128, major, bias=True),
        _build("forward", _forward, half, 64, major, bias=True, SAVE=True),
        _build("query gradient", _query_gradient, half, 64, major, bias=True),
        _build("key gradient", _key_gradient, half, 64, major, bias=True),
        _build("forward", _forward, full, 128, major, bias=True, SAVE=True),
        _build("query gradient", _query_gradient, full, 128, major, bias=True),
        _build("key gradient", _key_gradient, full, 128, major, bias=True),
    ]


def _build(
    name: str, kernel: Any, dtype: torch.dtype, channels: int, major: int, bias: bool = False, **switches: Any
) -> Build:
    sizes = attention_triton.tiles(kernel, dtype.itemsize, channels, major)
    constants = _constants(dtype, channels, sizes, channels**-0.5, bias) | switches

    # The types of the run-time arguments: strides and counts are numbers, all else pointers.
    element = "bf16" if dtype == torch.bfloat16 else "fp32"
    numbers = ("heads", "query_tokens", "key_tokens")
    types = {"bias": "*fp32", "lse": "*fp32", "delta": "*fp32"} | dict.fromkeys(numbers, "i32")
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constants:
            is_stride = argument.endswith(("_batch", "_row", "_head"))
            signature[argument] = "i32" if is_stride else types.get(argument, f"*{element}")
    aligned = tuple(argument for argument in signature if argument not in numbers)

    title = f"attention {name}, {element}, {channels} channels{', bias' * bias}"
    spill = 1024 if element == "fp32" else 0  # by Triton 3.6 alone; float32 is there to be right, not to be fast
    matrices = _matrices(kernel, sizes, channels) if dtype.itemsize == 2 else ()
    return Build(title, kernel, signature, constants, sizes.warps, sizes.stages, aligned, spill, matrices)


def _matrices(kernel: Any, sizes: Tiles, channels: int) -> tuple[tuple[int, int, int], ...]:
    """List rows, columns and depth of the products of one tile of queries and one of keys."""
    queries, keys = sizes.queries, sizes.keys
    if kernel is _key_gradient:
        return ((keys, queries, channels), (keys, channels, queries)) * 2
    inner, outer = (queries, keys, channels), (queries, channels, keys)
    return (inner, outer) if kernel is _forward else (inner, inner, outer)
