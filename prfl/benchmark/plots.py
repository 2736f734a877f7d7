"""Plots of benchmark results, in the report's style."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from prfl.benchmark.results import Row, by_case
from prfl.evaluation.plots import COLOURS, GREY, png, style


def ratios(rows: Sequence[Row]) -> bytes:
    """How many times as fast as the reference, with intervals: a panel a case, a line a provider."""
    cases = by_case(rows)
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(len(some) for some in cases.values())
    figure = Figure(figsize=(3.6 * columns + 1, (0.26 * tallest + 0.7) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(row.provider for row in rows))}
    for axes, (name, some) in zip(grid, cases.items(), strict=False):
        for place, row in enumerate(reversed(some)):
            found = row.info["times_reference"]
            axes.plot([found["low"], found["high"]], [place, place], color=colours[row.provider], linewidth=1.4)
            axes.plot([found["value"]], [place], "o", color=colours[row.provider], markersize=4)
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(some)), [row.provider for row in reversed(some)])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        style(axes, name)
    for axes in grid[len(cases) :]:
        axes.set_visible(False)
    return png(figure)
