"""What every Triton kernel takes on GPUs that are not here, at Wan's shapes: registers, spilled bytes, shared memory,
the matrix work that is done over what is needed and by which instruction, and the other instructions of a pass of its
loop (of the whole kernel where it multiplies no matrices).

    python bench/compiled_kernels.py [--out bench/results/compiled_kernels.json]

Compiled by Triton and NVIDIA's assembler, read by cuobjdump and nvdisasm; nothing is run.  Run it in an environment of
every Triton that is supported: each keeps its own table beside the others'.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import studies
from bench.harness.facts import sources
from prfl_kernels.ahead import CAPABILITIES, Build, compile_ahead, count_instructions
from prfl_kernels.builds import every_build

COLUMNS = {  # of the printed table
    "tile": "tile, warps, stages", "registers": "registers", "spilled": "spilled bytes", "shared": "shared bytes",
    "matrix": "matrix products by", "work": "work done / needed", "loop": "other instructions of a warp",
}  # fmt: skip


def used(build: Build, capability: int) -> dict[str, Any]:
    sizes = [str(build.constants[name]) for name in ("QUERIES", "KEYS") if name in build.constants]
    tile = ", ".join([" x ".join(sizes) or "-", str(build.num_warps), str(build.num_stages)])
    return {
        "tile": tile,
        **compile_ahead(build, capability)._asdict(),
        **count_instructions(build, capability)._asdict(),
    }


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """Tabulate what every kernel takes, by its name and the capability."""
    by_kernel: dict[str, dict[str, dict[str, Any]]] = {}
    for capability in CAPABILITIES:
        for build in every_build(capability):
            by_kernel.setdefault(build.name, {})[f"sm_{capability}"] = used(build, capability)
    return by_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/compiled_kernels.json"))
    path = parser.parse_args().out
    earlier = json.loads(path.read_text(encoding="utf-8")).get("triton", {}) if path.exists() else {}
    kernels = table()
    of_this_triton = {"sources": sources(("kernels",)), "kernels": kernels}
    tables = (earlier if isinstance(earlier, dict) else {}) | {version("triton"): of_this_triton}
    studies.write(path, {"triton": dict(sorted(tables.items()))}, weights="none: compiled, not run")
    print(f"By Triton {version('triton')}, on {' / '.join(f'sm_{each}' for each in CAPABILITIES)}:\n")
    print("| kernel | " + " | ".join(COLUMNS.values()) + " |\n|" + " --- |" * (1 + len(COLUMNS)))
    for name, by_capability in kernels.items():
        columns = (" / ".join(str(facts[key]) for facts in by_capability.values()) for key in COLUMNS)
        print(f"| {name} | {' | '.join(columns)} |")


if __name__ == "__main__":
    main()
