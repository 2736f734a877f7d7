"""The table of bench/study_labels.py: accuracy by the number of answers, at random and least sure first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def labels(result: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    body = []
    for row in result["rows"]:
        line = [str(row["answers"])]
        for way in ("random", "uncertain"):
            reached = row.get(way, {}).get("accuracy", [])
            line.append(f"{statistics.mean(reached):.3f} ± {statistics.stdev(reached):.3f}" if reached else "")
        if "random answers for the same" in row:
            pairs = zip(row["uncertain"]["accuracy"], row["random"]["accuracy"], strict=True)
            less = [chosen - drawn for chosen, drawn in pairs]
            error = statistics.stdev(less) / len(less) ** 0.5
            same = row["the same, by seed"]
            line += [f"{statistics.mean(less):+.3f} ± {error:.3f}", str(row["random answers for the same"])]
            line.append(f"{min(same)} to {max(same)}")
        body.append(line + [""] * (6 - len(line)))
    return ["answers", "at random", "least sure first", "difference", "as good at random", "by seed"], body
