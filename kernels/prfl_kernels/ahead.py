"""Compiles Triton kernels for GPUs that are not here, and reads what they take: registers, spills, shared memory, and
how much of their matrix work is needed.

Triton's own compiler and NVIDIA's assembler run on any Linux machine; only launching needs the device.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prfl_kernels.machine_code import Instructions, instructions, products

CAPABILITIES = (80, 89, 90, 100, 120)  # A100; L40S and RTX 4090; H100 and H200; B200; RTX 5090
# Bytes of a block.  8.6 (A10, RTX 3090) has what 8.9 has.
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
WARPGROUP_ROWS = 64  # of a product, and Hopper's own instruction takes it; with fewer it is Ampere's


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched for one shape.

    signature: the type of each run-time argument, such as ``{"x": "*bf16", "rows": "i32"}``.
    constants: the values of its ``tl.constexpr`` arguments.  aligned: run-time arguments that are multiples of 16,
    pointers among them, as at a launch.  spill: bytes of a thread's stack that it may take at most.  matrices: the
    (M, N, K) of the products that one pass of its loop needs on tensor cores.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = field(default=())
    spill: int = 0
    matrices: tuple[tuple[int, int, int], ...] = ()

    def instruction(self, capability: int) -> str:
        """Name the instruction that multiplies matrices on a GPU of this capability, as ``machine_code.Products``."""
        if not self.matrices:
            return ""
        large = all(rows >= WARPGROUP_ROWS for rows, _, _ in self.matrices)
        return {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma") if large else "mma"


class Resources(NamedTuple):
    """What a compiled kernel takes of a GPU."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a block
    matrix: str  # what multiplies matrices, as ``machine_code.Products`` names it; empty where nothing does
    work: float | None  # the matrix work that is done over what is needed: 1 where nothing is computed twice


def compile_ahead(build: Build, capability: int) -> Resources:
    """Compile a kernel for a GPU of this capability (80 is 8.0), and read what it takes."""
    compiled = _compiled(build, capability)
    registers, spilled = _usage(compiled.asm["cubin"])

    loops = products(compiled.asm["ptx"], build.num_warps)
    kind = "+".join(dict.fromkeys(loop.kind for loop in loops))
    needed = sum(rows * columns * depth for rows, columns, depth in build.matrices)
    work = max((loop.multiplies for loop in loops), default=0) / needed if needed else None
    return Resources(registers, spilled, compiled.metadata.shared, kind, work)


def count_instructions(build: Build, capability: int) -> Instructions:
    """Count what a warp does beside its matrix products, in the disassembled machine code."""
    compiled = _compiled(build, capability)
    loops = products(compiled.asm["ptx"], build.num_warps)
    return instructions(_tool("nvdisasm", compiled.asm["cubin"], "-c"), loops[0].instructions if loops else 0)


def _compiled(build: Build, capability: int) -> Any:
    """Compile a kernel, to its ``asm`` (PTX, cubin) and ``metadata``.  Raises ValueError for wrong arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    wrong = (build.signature.keys() | build.constants.keys()) ^ set(names)
    if wrong:
        raise ValueError(f"{build.name}: arguments {sorted(wrong)} are missing or unknown; the kernel has {names}")

    source = ASTSource(
        fn=build.kernel,
        signature={name: build.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Read the registers and the stack bytes of a thread."""
    text = _tool("cuobjdump", cubin, "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(match[1]), int(match[2])


def _tool(name: str, cubin: bytes, option: str) -> str:
    """Run one of NVIDIA's tools that Triton brings, on a cubin.  Returns what it prints."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, encoding="utf-8").stdout
