"""What every Triton kernel takes on GPUs that are not here: registers, spilled bytes and shared memory at Wan's shapes.

    python bench/compiled_kernels.py [--out bench/results/compiled_kernels.json]

Compiled by Triton and NVIDIA's assembler, read by cuobjdump; nothing is run.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import studies

from prfl_kernels.ahead import CAPABILITIES, compile_ahead
from prfl_kernels.builds import every_build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compiled_kernels.json"))
    kernels = [
        {
            "kernel": build.name, "warps": build.num_warps, "stages": build.num_stages,
            **{f"sm_{capability}": compile_ahead(build, capability)._asdict() for capability in CAPABILITIES},
        }
        for build in every_build()
    ]  # fmt: skip
    studies.write(parser.parse_args().out, {"triton": version("triton"), "kernels": kernels})
    print(
        "| kernel | warps | registers, sm_80 / sm_90 | spilled bytes | shared bytes |\n| --- | --- | --- | --- | --- |"
    )
    for kernel in kernels:
        used = [kernel[f"sm_{capability}"] for capability in CAPABILITIES]
        columns = (" / ".join(str(each[key]) for each in used) for key in ("registers", "spilled", "shared"))
        print(f"| {kernel['kernel']} | {kernel['warps']} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
