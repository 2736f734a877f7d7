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
    """List the matrix products of every innermost loop that has any, in the order of the code."""
    lines = ptx.splitlines()
    constants = dict(CONSTANT.findall(ptx))
    loops = []
    for loop in _loops(lines, PTX_LABEL, PTX_BRANCH):
        by_line = [_product(line, warps, constants) for line in loop]
        matrix_products = [product for product in by_line if product is not None]
        if matrix_products:
            kinds = "+".join(dict.fromkeys(kind for kind, _ in matrix_products))
            multiplies = sum(count for _, count in matrix_products)
            loops.append(Products(kinds, len(matrix_products), multiplies))
    return loops


def _product(line: str, warps: int, constants: dict[str, str]) -> tuple[str, int] | None:
    """Read a line of PTX: kind and multiply-adds of the whole program, or None where it is no matrix product."""
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
    """Count a warp's instructions in disassembled machine code.

    matrix: how many of one warp's matrix products are in a pass; the assembler may have joined several passes.
    """
    lines = sass.splitlines()
    narrow = sum("LDG." in line and ".128" not in line for line in lines)
    for loop in _loops(lines, SASS_LABEL, SASS_BRANCH):
        codes = [match[1] for line in loop if (match := SASS_INSTRUCTION.search(line))]
        products_there = sum(SASS_MATRIX.search(code) is not None for code in codes)
        if products_there:
            return Instructions((len(codes) - products_there) * matrix // products_there, narrow)
    return Instructions(sum(SASS_INSTRUCTION.search(line) is not None for line in lines), narrow)


def _loops(lines: list[str], label: re.Pattern[str], branch: re.Pattern[str]) -> list[list[str]]:
    """Cut out the lines of every innermost loop: from a label to the last branch back to it."""
    starts = {match[1]: number for number, line in enumerate(lines) if (match := label.match(line))}
    ends: dict[int, int] = {}  # by start
    for number, line in enumerate(lines):
        match = branch.search(line)
        if match and starts.get(match[1], number) < number:
            ends[starts[match[1]]] = number

    innermost = []
    for start, end in sorted(ends.items()):
        holds_another = any(start < other and ends[other] <= end for other in ends)
        if not holds_another:
            innermost.append(lines[start : end + 1])
    return innermost
