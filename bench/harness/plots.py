"""Plots of benchmark results, in the report's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.cases.scale import AXES, COSTS, Curve, Line, amount, fit
from bench.harness.results import Row, by_case
from bench.harness.scale_report import cell, figures
from prfl.evaluation.plots import COLOURS, GREY, png, style
from prfl.utils.hashing import json_hash

WIDE = 40  # letters of a panel's title
DIGEST = "prfl-digest"  # in a picture's own text: of the figures in it


def ratios(rows: Sequence[Row]) -> bytes:
    """Plot how many times as fast as the reference, with intervals: a panel a case, a line a provider."""
    cases = by_case(rows)
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    tallest = max(len(rows_of_case) for rows_of_case in cases.values())
    figure = Figure(figsize=(3.6 * columns + 1, (0.26 * tallest + 0.7) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(row.provider for row in rows))}
    for axes, name, rows_of_case in zip(grid, titles(cases), cases.values(), strict=False):
        for height, row in enumerate(reversed(rows_of_case)):
            ratio = row.info["times_reference"]
            axes.plot([ratio["low"], ratio["high"]], [height, height], color=colours[row.provider], linewidth=1.4)
            axes.plot([ratio["value"]], [height], "o", color=colours[row.provider], markersize=4)

        # A scale around 1, never narrower than a few percent, with round numbers on it.
        axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(rows_of_case)), [row.provider for row in reversed(rows_of_case)])
        axes.set_xscale("log")
        left, right = axes.get_xlim()
        left, right = min(left, 0.75), max(right, 1.35)  # a difference of a few percent looks like one
        axes.set_xlim(left, right)
        wide = [f * 10.0**power for power in range(-4, 5) for f in ((1,) if right / left > 100 else (1, 2, 5))]
        ticks = wide if right / left > 5 else [0.2, 0.3, 0.5, 0.8, 1, 1.25, 2, 3]
        ticks = [tick for tick in ticks if left <= tick <= right]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        style(axes, name)
    for axes in grid[len(cases) :]:
        axes.set_visible(False)
    return png(figure)


def titles(cases: Mapping[str, Sequence[Row]]) -> list[str]:
    """Title panels side by side by the settings in which they differ; one alone by all of them."""
    settings = [rows_of_case[0].info["settings"] for rows_of_case in cases.values()]
    words = [[f"{value}" if isinstance(value, str) else f"{key} {value}" for key, value in s.items()] for s in settings]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    return [fill(", ".join(word for word in words_of_case if word not in shared), WIDE) for words_of_case in words]


def scale(curves: Sequence[Curve]) -> bytes:
    """Plot costs against size: a row of panels a cost, a column an axis, a colour a provider; each with its line.

    From zero up, so that what is flat looks flat.  Bars are what a fifth of the rounds lies below and above.
    """
    axes_of = [axis for axis in AXES.values() if any(curve.axis == axis for curve in curves)]
    providers = list(dict.fromkeys(curve.provider for curve in curves))
    columns = max(3, len(axes_of))  # a single panel would be as wide as the page
    figure = Figure(figsize=(2.45 * columns, 2.15 * len(COSTS) + 0.3), layout="constrained")
    grid = figure.subplots(len(COSTS), columns, squeeze=False)

    for column, axis in enumerate(axes_of):
        for row, (key, cost) in enumerate(COSTS.items()):
            panel = grid[row, column]
            by_provider = {curve.provider: curve for curve in curves if curve.axis == axis}
            for number, provider in enumerate(by_provider):
                line, colour = fit(by_provider[provider], key), COLOURS[providers.index(provider) % len(COLOURS)]
                if line is not None:
                    _fitted(panel, by_provider[provider], line, colour)
                    words = "flat" if line.flat else f"{figures(line.slope)} {cost.unit} a {axis.unit}"
                    words = words if line.straight else "no line"
                    panel.text(0.03, 0.98 - 0.11 * number, words, color=colour, fontsize=7.5, va="top",
                               transform=panel.transAxes)  # fmt: skip
            panel.set_ylim(0, panel.get_ylim()[1] * (1.15 + 0.14 * len(by_provider)))  # room for the words
            values = next(iter(by_provider.values())).values
            panel.set_xticks([amount(value) for value in values], [str(value) for value in values])
            panel.margins(x=0.12)
            if column == 0:
                panel.set_ylabel(f"{cost.label}, {cost.unit}")
            style(panel, axis.label if row == 0 else "")

    for panel in grid[:, len(axes_of) :].flatten():
        panel.set_visible(False)
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", markersize=4) for i in range(len(providers))]
    figure.legend(
        handles, providers, loc="outside upper left", ncols=len(providers), frameon=False, fontsize=8, labelcolor=GREY
    )
    return png(figure, {DIGEST: digest(curves)})


def digest(curves: Sequence[Curve]) -> str:
    """Hash all figures that ``scale`` draws, with as many digits as a table has."""
    contents = []
    for curve in curves:
        line = [cell(fit(curve, cost)) for cost in COSTS]
        for row in curve.rows:
            low, high = (figures(row.info["milliseconds"][end]) for end in ("low", "high"))
            contents.append([curve.axis.label, curve.provider, curve.values, low, high, line])
    return json_hash(contents, sort_keys=False)[:16]


def drawn(picture: Path) -> str:
    """Read the digest that a picture has in itself; empty where there is none, or no picture."""
    from PIL import Image

    if not picture.exists():
        return ""
    with Image.open(picture) as image:
        return str(image.info.get(DIGEST, ""))


def _fitted(panel: Axes, curve: Curve, line: Line, colour: str) -> None:
    ends = line.amounts[line.first], line.amounts[-1]
    if line.straight:
        panel.plot(ends, [line.at(end) for end in ends], color=colour, linewidth=1.2, linestyle="--", alpha=0.7)
    panel.plot(line.amounts, line.costs, "o", color=colour, markersize=4)
    if line.interval:
        for position, row in zip(line.amounts, curve.rows, strict=True):
            milliseconds = row.info["milliseconds"]
            panel.plot([position, position], [milliseconds["low"], milliseconds["high"]], color=colour, linewidth=1.2)
