"""The tables of bench/public_rewards.py: what a score with its gradient costs by each reward."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

GIBIBYTES = "weights GiB", "saved GiB", "peak GiB"


def public_rewards(result: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    body = []
    for name, row in result["rows"].items():
        sizes = [f"{row[key]:.1f} GiB" if row[key] >= 0.1 else f"{1024 * row[key]:.0f} MiB" for key in GIBIBYTES]
        body.append([_quoted(name), *sizes, f"{row['TFLOP']:.3g}"])
    return ["reward", "weights", "saved", "peak", "TFLOP"], body


def public_rewards_cpu(result: Mapping[str, Any]) -> tuple[Sequence[str], list[list[str]]]:
    body = []
    for name, row in result["rows"].items():
        seconds = row["processor seconds"]
        share = f"{100 * row['share of the network']:.0f} %"
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        body.append([_quoted(name), share, f"{row['TFLOP']:.2f}", spread])
    return ["reward", "of the network", "TFLOP", "processor seconds"], body


def _quoted(name: str) -> str:
    return name if " " in name else f"`{name}`"
