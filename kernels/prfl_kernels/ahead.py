"""Compiles Triton kernels for GPUs that are not here, and reads what they take: registers, spills, shared memory.

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

CAPABILITIES = (80, 90)  # A100, H100 and H200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block


@dataclass(frozen=True)
class Build:
    """One kernel as it is launched for one shape.

    signature: the type of each run-time argument, such as ``{"x": "*bf16", "rows": "i32"}``.
    constants: the values of its ``tl.constexpr`` arguments.  aligned: run-time arguments that are multiples of 16,
    pointers among them, as at a launch.  spill: bytes of a thread's stack that it may take at most.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = field(default=())
    spill: int = 0


class Resources(NamedTuple):
    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes of a block


def compile_ahead(build: Build, capability: int) -> Resources:
    """What the kernel takes on a GPU of this capability (80 is 8.0)."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Resources(*_usage(compiled.asm["cubin"]), compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as NVIDIA's cuobjdump (which Triton brings) finds them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, encoding="utf-8"
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {text}")
    return int(found[1]), int(found[2])
