"""Figures as PNG bytes (matplotlib's Agg, no display), drawn to be read on light and on dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prfl.evaluation.reward_eval import Measure, Row
from prfl.utils.text import visible

COLOURS = ("#3b6fd4", "#e07b39", "#2f9e6e", "#b0489b", "#8a7a2b", "#5f6b7a")
GREY = "#7d8590"
LONGEST = 40  # letters of a name


def png(figure: Figure, text: Mapping[str, str] | None = None) -> bytes:
    """Write a figure as PNG.  text: metadata of the picture, by keyword."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, transparent=True, metadata=text)
    return buffer.getvalue()


def plain(name: str) -> str:
    """Make a user's name fit for matplotlib: not too long, and shown as it is.

    A dollar sign would begin a formula, and an underscore at the front would hide the line from the legend.
    """
    shown = visible(name)
    if len(shown) > LONGEST:
        shown = f"{shown[: LONGEST - 1]}…"
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def style(axes: Axes, title: str = "") -> None:
    """Draw lines and text in grey, which stands out from white and from black alike."""
    axes.set_title(plain(title), fontsize=9, color=GREY, loc="left")
    axes.tick_params(colors=GREY, labelsize=7.5, length=0)
    axes.grid(color=GREY, alpha=0.22, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
        spine.set_alpha(0.5)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(GREY)
        label.set_fontsize(8)


def curve(records: Sequence[Mapping[str, Any]], name: str) -> bytes:
    """Draw a metric over ``step``: the recorded numbers, pale, and their running mean where there are many."""
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).T
    figure, axes = _curve_axes()
    for line in list(axes.lines):
        line.remove()
    axes.relim()
    axes.autoscale(True)
    if len(values) < 40:
        axes.plot(steps, values, color=COLOURS[0], linewidth=1.4, marker="o", markersize=2.5)
        return png(figure)

    # Many values: pale, with their running mean, and without the range of outliers.
    axes.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values, len(values) // 20), color=COLOURS[0], linewidth=1.6)
    low, high = np.nanpercentile(values, [0.5, 99.5])
    room = 0.08 * (high - low) or 1e-3
    axes.set_ylim(low - room, high + room)
    return png(figure)


@cache
def _curve_axes() -> tuple[Figure, Axes]:
    """Make the one pair of axes that all curves are drawn on, one after the other.

    A report has dozens of curves and is written at every round: new axes and ticks for each, or margins that are fitted
    to its text, take as long again as drawing it.
    """
    figure = Figure(figsize=(3.6, 2.1))
    axes = figure.subplots(gridspec_kw={"left": 0.16, "right": 0.97, "bottom": 0.2, "top": 0.87})
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step")
    style(axes)
    return figure, axes


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Average over up to ``width`` values each way; the ends average what there is."""
    total = np.concatenate([[0.0], np.nancumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def by_sigma(rows: Sequence[Row], dimensions: Sequence[str], measure: Measure, shift: float = 5.0) -> bytes:
    """Draw a measure against sigma, one panel a dimension, one band a scorer; dots are at the sampler's own sigmas.

    The sigma axis is spread as a sampler with this shift spreads its steps, so that 0.9 to 1 can be read.
    """
    columns = min(3, len(dimensions))
    lines = -(-len(dimensions) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flatten()

    scorers = list(dict.fromkeys(row.scorer for row in rows))
    for axes, dimension in zip(grid, dimensions, strict=False):
        for colour, scorer in zip(cycle(COLOURS), scorers, strict=False):
            band_rows = [row for row in rows if (row.scorer, row.dimension) == (scorer, dimension)]
            _band(axes, band_rows, measure, scorer, colour)
        if measure.ignorant is not None:
            axes.axhline(measure.ignorant, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xscale("function", functions=(lambda s: s / (shift - (shift - 1) * s), lambda u: _shifted(u, shift)))
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 0.8, 0.9, 0.95, 1])
        axes.set_xlabel("sigma (1 = noise)")
        style(axes, dimension)
    for axes in grid[len(dimensions) :]:
        axes.set_visible(False)

    # A scorer may lack the first dimension: take each from the first panel that has it.
    named: dict[str, Any] = {}
    for axes in grid[::-1]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named[label] = handle
    labels = [label for label in map(plain, scorers) if label in named]
    handles = [named[label] for label in labels]
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=8, labelcolor=GREY
    )
    return png(figure)


def _band(axes: Axes, rows: Sequence[Row], measure: Measure, name: str, colour: str) -> None:
    """Draw bins at their middle and points at their sigma, joined; the sampler's own sigmas as dots."""
    points = [(row.level, value) for row in rows if (value := measure.read(row))]
    points.sort(key=lambda point: point[0].low + point[0].high)
    line = [((level.low + level.high) / 2, value) for level, value in points if level.kind != "sampler"]
    if not line:
        return

    middle = [sigma for sigma, _ in line]
    axes.plot(middle, [value.value for _, value in line], color=colour, linewidth=1.6, label=plain(name))
    low, high = [value.low for _, value in line], [value.high for _, value in line]
    axes.fill_between(middle, low, high, color=colour, alpha=0.15, linewidth=0)

    dots = [(level.low, value.value) for level, value in points if level.kind == "sampler"]
    if dots:
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=2.2)


def _shifted(u: np.ndarray, shift: float) -> np.ndarray:
    """Shift evenly spaced sigmas as a sampler does."""
    return shift * u / (1 + (shift - 1) * u)


def reliability(rows: Sequence[Row]) -> bytes:
    """Draw the predicted probability against the share of good samples, one line a row (a scorer at a level)."""
    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    tables = [(row, row.reliability) for row in rows if row.reliability is not None]
    for colour, (row, table) in zip(cycle(COLOURS), tables, strict=False):
        label = plain(f"{row.scorer}, sigma {row.level.label}")
        axes.plot(table.predicted, table.observed, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
    axes.set(xlabel="predicted probability", ylabel="share of good ones", xlim=(0, 1), ylim=(0, 1))
    style(axes, "calibration")
    axes.legend(frameon=False, fontsize=7.5, labelcolor=GREY)
    return png(figure)
