"""Reads what a compiled kernel does: the matrix products of a pass of its loop, and the instructions beside them.

Matrix products are counted in PTX, whose instructions carry their shapes; the assembler turns each into one of its own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

PTX_LABEL, PTX_BRANCH = re.compile(r"\s*(\$L__BB\d+_\d+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\d+_\d+);")
SASS_LABEL, SASS_BRANCH = re.compile(r"\s*(\.L_x_\d+):"), re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)")
MMA = re.compile(r"\b(wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")
TCGEN05 = re.compile(r"\btcgen05\.mma\.cta_group::1\.kind::f16\b.*?,\s*(%r\d+|\d+),\s*!?%p\d+;")
CONSTANT = re.compile(r"mov\.b32\s+(%r\d+),\s*(-?\d+);")
SASS_MATRIX = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
SASS_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;")


class Products(NamedTuple):
    """Matrix products of one pass of a loop."""

    kind: str  # "mma", "wgmma" (of Hopper's warpgroups) or "tcgen05" (of Blackwell)
    instructions: int  # of one warp
    multiplies: int  # multiply-adds of the whole program


def products(ptx: str, warps: int) -> list[Products]:
    """Of every innermost loop that has any, in the order of the code."""
    lines = ptx.splitlines()
    constants = dict(CONSTANT.findall(ptx))
    found = []
    for loop in _loops(lines, PTX_LABEL, PTX_BRANCH):
        each = [one for line in loop if (one := _product(line, warps, constants)) is not None]
        if each:
            kinds = "+".join(dict.fromkeys(kind for kind, _ in each))
            found.append(Products(kinds, len(each), sum(multiplies for _, multiplies in each)))
    return found


def _product(line: str, warps: int, constants: dict[str, str]) -> tuple[str, int] | None:
    if match := MMA.search(line):
        m, n, k = (int(size) for size in match.groups()[1:])
        if match[1] == "mma":
            return "mma", m * n * k * warps
        return "wgmma", m * n * k * (warps // 4)
    if match := TCGEN05.search(line):  # its shape is in a descriptor: N / 8 from bit 17, M / 16 from bit 24; K is 16
        descriptor = int(constants.get(match[1], match[1]))
        return "tcgen05", ((descriptor >> 24 & 31) * 16) * ((descriptor >> 17 & 63) * 8) * 16
    return None


class Instructions(NamedTuple):
    """Machine instructions of one warp, matrix products left out."""

    loop: int  # of one pass of its first loop with matrix products; of the whole kernel where there is none
    narrow_loads: int  # loads from global memory of less than 16 bytes a thread, in all of the kernel


def instructions(sass: str, matrix: int) -> Instructions:
    """matrix: how many of one warp's matrix products are in a pass; the assembler may have joined several passes."""
    lines = sass.splitlines()
    narrow = sum("LDG." in line and ".128" not in line for line in lines)
    for loop in _loops(lines, SASS_LABEL, SASS_BRANCH):
        every = [match[1] for line in loop if (match := SASS_INSTRUCTION.search(line))]
        own = sum(SASS_MATRIX.search(one) is not None for one in every)
        if own:
            return Instructions((len(every) - own) * matrix // own, narrow)
    return Instructions(sum(SASS_INSTRUCTION.search(line) is not None for line in lines), narrow)


def _loops(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str]) -> list[list[str]]:
    """The lines of every innermost loop: from a label to the last branch back to it."""
    starts = {match[1]: at for at, line in enumerate(lines) if (match := label.match(line))}
    ends: dict[int, int] = {}
    for at, line in enumerate(lines):
        match = branch.search(line)
        if match and starts.get(match[1], at) < at:
            ends[starts[match[1]]] = at
    inner = [
        (start, end)
        for start, end in ends.items()
        if not any(start < other and ends[other] <= end for other in ends if other != start)
    ]
    return [lines[start : end + 1] for start, end in sorted(inner)]
