"""What the studies share: runs of ``prfl train`` on one thread each, two at a time, and the facts beside a result.

A run whose result is there is not run again, so a stopped study goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prfl.benchmark.facts import facts
from prfl.data.files import replacing

SEEDS = (0, 1, 2)
DIMENSIONS = ("shape", "colour", "direction", "speed", "steadiness")


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def run(command: list[str], console: Path) -> None:
    """One python process on one thread; its output goes to ``console``.  Raises CalledProcessError."""
    console.parent.mkdir(parents=True, exist_ok=True)
    with open(console, "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=log, env=environment)
    print(f"[{time.strftime('%H:%M:%S')}] {console.parent.name}/{console.name}", flush=True)


def train(folder: Path, config: str, overrides: list[str]) -> Path:
    """``prfl train``, unless it has finished before; the run's folder."""
    if not (folder / "report.html").exists():
        run(["-m", "prfl.cli", "train", config, f"run={folder}", *overrides], folder / "console.txt")
    return folder


def records(folder: Path, key: str) -> list[dict]:
    """The lines of a run's metrics that have ``key``."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def write(path: Path, result: dict) -> None:
    """The result with what a reader needs to weigh it."""
    found = facts("the shapes world's trained base (prfl/data/shapes/model)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**found, **result}, indent=1) + "\n")
    print(f"wrote {path}")
