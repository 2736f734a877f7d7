"""Peak memory of one PRFL step at Wan's real shapes, as ``prfl train --dry-run`` predicts it, beside the targets.

    python bench/predicted_memory.py [--out bench/results/memory.json]

Nothing is downloaded or allocated: the step runs on ``meta`` with the shapes of the real model.  GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import studies

from prfl import build
from prfl.config import load_config
from prfl.forecast.memory import predict_memory

P480 = ("data.frames=81", "data.height=480", "data.width=832")
P720 = ("data.frames=81", "data.height=720", "data.width=1280")
FULL, OFFLOAD = "backbone.checkpointing=full", "backbone.offload=true"
SMALL, LARGE = "configs/wan2.1-1.3b", "configs/wan2.1-14b"
CASES = {  # name: config, overrides, target in GB before the kernels
    "1.3B 480p": (f"{SMALL}/prfl.yaml", (*P480, FULL), 12),
    "14B 480p": (f"{LARGE}/prfl.yaml", (*P480, FULL), 56),
    "14B 480p, offload": (f"{LARGE}/prfl.yaml", (*P480, FULL, OFFLOAD), None),
    "14B 720p": (f"{LARGE}/prfl.yaml", (*P720, FULL), 90),
    "14B 720p, offload": (f"{LARGE}/prfl.yaml", (*P720, FULL, OFFLOAD), 58),
    "14B 480p, attention kept": (f"{LARGE}/prfl.yaml", (*P480, "backbone.checkpointing=attention"), None),
    "1.3B 480p, full chain": (f"{SMALL}/prfl.yaml", (*P480, FULL, "objective={name: full_chain}"), None),
}


def predicted(config_file: str, overrides: tuple[str, ...], target: float | None) -> dict:
    config = load_config(config_file, ["backbone.device=cuda", *overrides])
    memory = predict_memory(config, build.architecture(config))
    return {
        "config": config_file, "overrides": list(overrides), "peak GB": memory.peak / 1e9, "target GB": target,
        "assumed": memory.assumed, "always alive": {part.name: part.bytes for part in memory.fixed},
        "phases": {part.name: {"bytes": part.bytes, "saved for backward": part.saved} for part in memory.phases},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/memory.json"))
    cases = {name: predicted(*case) for name, case in CASES.items()}
    studies.write(parser.parse_args().out, {"measured": "nothing: predicted on meta tensors", "cases": cases})
    for name, case in cases.items():
        target = f"   target {case['target GB']} GB" if case["target GB"] else ""
        print(f"{name:28} {case['peak GB']:6.1f} GB{target}")


if __name__ == "__main__":
    main()
