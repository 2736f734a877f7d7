"""The table of bench/study_labels.py: accuracy by the number of answers, at random and asked by heads."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ["answers", "at random", "least sure first", "as good at random", "heads differ first", "as good at random"]


def labels(result: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    body = []
    for row in result["rows"]:
        line = [str(row["answers"]), reached(row["random"]["accuracy"])]
        for way in ("uncertain", "disagreement"):
            chosen = row.get(way, {})
            line.append(reached(chosen["accuracy"]) if chosen else "")
            line.append(as_good(chosen) if "random answers for the same" in chosen else "")
        body.append(line)
    return HEADER, body


def reached(accuracy: Sequence[float]) -> str:
    return f"{statistics.mean(accuracy):.3f} ± {statistics.stdev(accuracy):.3f}"


def as_good(chosen: Mapping[str, Any]) -> str:
    """How many random answers reach the mean's accuracy, and each seed's."""
    by_seed = chosen["the same, by seed"]
    return f"{chosen['random answers for the same']} ({min(by_seed)} to {max(by_seed)})"
