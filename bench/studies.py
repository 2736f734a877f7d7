"""What the studies share: runs of ``prfl train`` on one thread each, two at a time, and the facts beside a result.

A run whose result is there is not run again, so a stopped study goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.harness.facts import facts
from prfl.utils import metrics_file
from prfl.utils.files import atomic_write

SEEDS = (0, 1, 2)
TRAINED = "the shapes world's trained base (prfl/toy/model)"
COUNTED = "none: counted on meta tensors"
FINISHED = "finished"  # a file in the folder of a run that came to its end; the report is there before
SAME = 0.01  # of a seed's samples: another processor's last bits turn a few
DIMENSIONS = ("shape", "colour", "direction", "speed", "steadiness")


def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def run(command: list[str], console: Path) -> None:
    """Run one Python process on one thread; its output goes to ``console``.  Raises CalledProcessError."""
    console.parent.mkdir(parents=True, exist_ok=True)
    with open(console, "a", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=log, env=environment)
    print(f"[{time.strftime('%H:%M:%S')}] {console.parent.name}/{console.name}", flush=True)


def train(folder: Path, config: str, overrides: list[str]) -> Path:
    """Run ``prfl train``, unless it has finished before; returns the run's folder."""
    if not (folder / FINISHED).exists():
        run(["-m", "prfl.cli", "train", config, f"run={folder}", *overrides], folder / "console.txt")
        (folder / FINISHED).touch()
    return folder


def outcome(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read a finished run: of each measure the base's mean, the policy's, and the paired difference with interval.

    names: the measures; one that the run did not take is left out.
    """
    results = json.loads((folder / "samples" / "final" / "results.json").read_text(encoding="utf-8"))
    base, policy = results["outcomes"]["base"], results["outcomes"]["policy"]
    measures = {
        name: {
            "base": base["summary"][name]["value"],
            "policy": policy["summary"][name]["value"],
            "difference": policy["difference"][name],
        }
        for name in names
        if name in policy["difference"]
    }
    return {"samples": results["samples"], "measures": measures}


def interval(value: Mapping[str, float], sign: str = "") -> str:
    """Write a value with the ends of its interval.  sign: "+" shows it where it is positive, too."""
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def records(folder: Path, key: str) -> list[dict]:
    """Read the rows of a run's steps that have ``key``."""
    rows, _ = metrics_file.records(folder / "metrics.jsonl")
    return [row for row in rows if row["phase"] == "training" and key in row]


def rounds(folder: Path, key: str) -> list[dict]:
    """Read the rounds on validation prompts that have the measure ``key``, by the names of a results.json."""
    rows, _ = metrics_file.records(folder / "metrics.jsonl")
    measures = [
        {metrics_file.measure_name(name): value for name, value in row.items() if name != "phase"}
        for row in rows
        if row["phase"] == "validation"
    ]
    return [row for row in measures if key in row]


def added(path: Path, result: dict, runs: str) -> dict:
    """Join ``result`` with what ``path`` has of other runs, whose folders may be gone.

    runs: the key that both have what they say of each run under; ``rows`` are by generator.  A row that both have must
    be the same, seed by seed, up to what another processor's last bits change: the new rows' paired differences are
    those to the new one.  The old one stays.  Raises SystemExit where it is not the same, where there is none, or where
    anything but runs and rows differs.
    """
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in result.keys() - {runs, "rows"}:
        if old[key] != result[key]:
            raise SystemExit(f"{path}: {key} is {old[key]} there and {result[key]} here: not the same study")

    # What both have must be the same, and there must be something.
    rows, new = ({row["generator"]: row for row in each["rows"]} for each in (old, result))
    if len(rows.keys() & new.keys()) < 2:
        raise SystemExit(f"{path}: run one of its rows again, beside the base: that shows that the two fit together")
    for name in rows.keys() & new.keys():
        there, here = (each[name]["right per seed"] for each in (rows, new))
        if any(abs(a - b) > SAME for a, b in zip(there, here, strict=True)):
            raise SystemExit(f"{path}: {name} has {there} there and {here} here: these are not the same runs")
        rows[name]["right, less that of"] = new[name]["right, less that of"] | rows[name]["right, less that of"]
        rows[name]["right per seed, again"] = here

    earlier = {key: old[key] for key in facts("") if key in old}
    return {
        **result,
        "earlier": [*old.get("earlier", []), {**earlier, "rows": list(rows)}],
        runs: result[runs] | old[runs],
        "rows": list((new | rows).values()),
    }


def write(path: Path, result: dict, add: str = "", weights: str = TRAINED) -> None:
    """Write the result with what a reader needs to weigh it.  add: as ``runs`` of ``added``, to keep what is there."""
    if add:
        result = added(path, result, add)
    provenance = facts(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**provenance, **result}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
