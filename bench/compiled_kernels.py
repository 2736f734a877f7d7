"""What every Triton kernel takes on GPUs that are not here: registers, spilled bytes and shared memory at Wan's shapes.

    python bench/compiled_kernels.py [--out bench/results/compiled_kernels.json]

Compiled by Triton and NVIDIA's assembler, read by cuobjdump; nothing is run.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import studies

from prfl_kernels.ahead import CAPABILITIES, Build, compile_ahead
from prfl_kernels.builds import every_build

ALSO = 100  # B200: where this Triton can


def used(build: Build, capability: int) -> dict[str, int] | None:
    try:
        return compile_ahead(build, capability)._asdict()
    except Exception:  # whatever a compiler raises that does not know a new GPU's instructions
        if capability in CAPABILITIES:
            raise
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compiled_kernels.json"))
    kernels = [
        {
            "kernel": build.name, "warps": build.num_warps, "stages": build.num_stages,
            **{f"sm_{capability}": used(build, capability) for capability in (*CAPABILITIES, ALSO)},
        }
        for build in every_build()
    ]  # fmt: skip
    studies.write(
        parser.parse_args().out, {"triton": version("triton"), "kernels": kernels}, weights="none: compiled, not run"
    )
    print(
        "| kernel | warps | registers, sm_80 / sm_90 | spilled bytes | shared bytes |\n| --- | --- | --- | --- | --- |"
    )
    for kernel in kernels:
        each = [kernel[f"sm_{capability}"] for capability in (*CAPABILITIES, ALSO)]
        columns = (
            " / ".join(str(one[key]) if one else "-" for one in each) for key in ("registers", "spilled", "shared")
        )
        print(f"| {kernel['kernel']} | {kernel['warps']} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
