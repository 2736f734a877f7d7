"""The rows of a metrics.jsonl: one for each training step, and one for each round on held-out prompts.

    {"step": 100, "phase": "training", "reward/shape": 0.3, "seconds/step": 2.1, ...}
    {"step": 100, "phase": "validation", "validation/reward/shape": 0.2, ...}

Values measured on held-out prompts have ``validation/`` in front of their names, here and in the trackers, so that
training and validation values never share a curve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Phase = Literal["training", "validation"]
HELD_OUT = "validation/"
FORMER_ACCURACY = "validation accuracy/"  # of a reward, in rows without a phase


def validation_names(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``validation/`` in front of every name."""
    return {f"{HELD_OUT}{name}": value for name, value in numbers.items()}


def measure_name(name: str) -> str:
    """Remove ``validation/`` from a name, which gives the measure's name in a results.json."""
    return name.removeprefix(HELD_OUT)


def records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read a metrics.jsonl: (its rows, the number of lines that a crash has damaged).  No rows where it does not exist.

    Rows of an older version get their phase and today's names.  Raises OSError if the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    complete, damaged = [], 0
    for line in filter(bytes.strip, lines):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError("no step")
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
        else:
            complete.append(with_phase(record))
    return complete, damaged


def with_phase(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row in today's form.  A row without a phase is of training if it has a loss or a time per step."""
    if "phase" in record:
        return record
    numbers = {name: value for name, value in record.items() if name != "step"}
    phase: Phase = "training" if not numbers.keys().isdisjoint(("seconds/step", "loss")) else "validation"
    if phase == "validation":
        numbers = validation_names({name.replace(FORMER_ACCURACY, "accuracy/"): n for name, n in numbers.items()})
    return {"step": record["step"], "phase": phase, **numbers}
