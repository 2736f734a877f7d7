"""The plot of bench/study_steering.py: the oracle's score against network calls."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.steering_rows import AIMED, PLAIN, STEPS
from prfl.evaluation import plots

SERIES = ("best of N, at the end (oracle)", "halving N, 0.5 and 0.75", "best of N, at 0.75", "best of N, at 0.5",
          "best of N, at the end", "one sample")  # fmt: skip
ALONE = {
    "fk": ("N chains, resampled (fk)", "D"),
    "(pixel)": ("best of N by a pixel reward", "x"),
    "ancestral": ("best of N noisy chains", "s"),
    "(read again)": ("best of N, read again at the end", "^"),
}  # points without a line


def series_of(name: str) -> tuple[str, str | None]:
    """Which line a row belongs to, and the marker of rows that are points by themselves."""
    for part, (series, marker) in ALONE.items():
        if part in name:
            return series, marker
    return re.sub("of [0-9]+|halving [0-9]+", lambda match: match[0].split()[0] + " N", name), None


def is_drawn(row: dict) -> bool:
    """Whether the plot has this row: no chance, and of two halvings that are nearly the same one."""
    return (row["reward"] != "random" or row["row"].startswith(PLAIN)) and "0.4 and 0.7" not in row["row"]


def plot(result: dict, path: Path) -> None:
    """The oracle's score against network calls: a panel for each generator and guidance, a line for each way to decide.

    Beside each point is its number of chains.  Rows that are in no series have their names.
    """
    worlds = list(dict.fromkeys((row["generator"], row["guidance"]) for row in result["rows"]))
    figure = Figure(figsize=(5 * len(worlds), 4.6), layout="constrained")
    colours = dict(zip(SERIES, (*plots.COLOURS, plots.GREY), strict=False))
    colours |= {series: plots.COLOURS[0] for series, _ in ALONE.values()}
    legend: dict[str, Any] = {}
    for axes, world in zip(figure.subplots(1, len(worlds), squeeze=False, sharey=True)[0], worlds, strict=True):
        lines: dict[tuple[str, str | None, int], list[tuple[float, float, str]]] = {}
        for row in result["rows"]:
            if (row["generator"], row["guidance"]) == world and is_drawn(row):
                series, marker = series_of(row["row"])
                number = str(row["chains"]) if series in colours else re.sub(",.*", "", row["row"])
                point = sum(row["calls"].values()), row["right"]["value"], number
                lines.setdefault((series, marker, row["steps"]), []).append(point)
        for (series, marker, steps), points in lines.items():
            dashes = "none" if marker else "-" if steps == min(STEPS) else ":"
            x, y, numbers = zip(*sorted(points), strict=True)
            colour = colours.get(series, plots.GREY)
            (line,) = axes.plot(
                x, y, marker=marker or "o", markersize=5 if marker else 4, color=colour, linestyle=dashes
            )
            for at in zip(x, y, numbers, strict=True):
                axes.annotate(at[2], at[:2], xytext=(4, 3), textcoords="offset points", fontsize=6, color=plots.GREY)
            if series in colours:
                legend[f"{series}; {steps} steps"] = line
        axes.axvline(AIMED, color=plots.GREY, linewidth=0.8)
        axes.set_xlabel("network calls a sample")
        plots.style(axes, f"{world[0]}, guidance {world[1]:g}")
    figure.axes[0].set_ylabel("right, says the oracle")
    figure.legend(
        legend.values(), legend.keys(), loc="outside right center", fontsize=7, frameon=False, labelcolor=plots.GREY
    )
    path.write_bytes(plots.png(figure))
