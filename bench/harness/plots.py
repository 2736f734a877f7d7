"""Plots of benchmark results, in the report's style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from bench.cases.scale import AXES, COSTS, Curve, Line, amount, fit
from bench.harness.results import Row
from bench.harness.scale_report import cell, figures
from prfl.evaluation.plots import COLOURS, GREY, plain, png, style
from prfl.utils.hashing import json_hash

DIGEST = "prfl-digest"  # in a picture's own text: of the figures in it


def ratios(rows: Sequence[Row]) -> bytes:
    """Plot how many times as fast as the reference each provider of one case is, with intervals."""
    figure, axes = _providers(rows)
    for height, row in enumerate(reversed(rows)):
        ratio, colour = row.info["times_reference"], COLOURS[(len(rows) - 1 - height) % len(COLOURS)]
        axes.plot([ratio["low"], ratio["high"]], [height, height], color=colour, linewidth=1.4)
        axes.plot([ratio["value"]], [height], "o", color=colour, markersize=4)

    # A scale around 1, never narrower than a few percent, with round numbers on it.
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    left, right = min(left, 0.75), max(right, 1.35)  # a difference of a few percent looks like one
    axes.set_xlim(left, right)
    wide = [f * 10.0**power for power in range(-4, 5) for f in ((1,) if right / left > 100 else (1, 2, 5))]
    ticks = wide if right / left > 5 else [0.2, 0.3, 0.5, 0.8, 1, 1.25, 2, 3]
    ticks = [tick for tick in ticks if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plain(f"times as fast as {rows[0].info['reference']} (logarithmic)"))
    style(axes)
    return png(figure)


def memory(rows: Sequence[Row]) -> bytes | None:
    """Plot the memory of each provider of one case: its peak, and what autograd keeps; None where neither is known."""
    kinds = {name: [_mebibytes(of(row)) for row in rows] for name, of in MEMORY.items()}
    kinds = {name: sizes for name, sizes in kinds.items() if any(size is not None for size in sizes)}
    if not kinds:
        return None
    figure, axes = _providers(rows)
    thickness = 0.7 / len(kinds)
    for number, (name, sizes) in enumerate(kinds.items()):
        heights = [len(rows) - 1 - i + (0.5 * (len(kinds) - 1) - number) * thickness for i in range(len(rows))]
        axes.barh(heights, [size or 0.0 for size in sizes], thickness, color=COLOURS[number], label=name)
    axes.set_xlabel("memory, MiB")
    axes.set_xlim(left=0)
    style(axes)
    if len(kinds) > 1:
        figure.legend(loc="outside upper left", ncols=len(kinds), frameon=False, fontsize=7.5, labelcolor=GREY)
    else:
        axes.set_xlabel(f"{next(iter(kinds))}, MiB")
    return png(figure)


MEMORY: dict[str, Callable[[Row], int | None]] = {
    "peak": lambda row: row.info["memory"].get("peak"),
    "saved for backward": lambda row: row.info["saved_bytes"],
}


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _providers(rows: Sequence[Row]) -> tuple[Figure, Axes]:
    """Make a figure with a line for each provider, the first at the top."""
    figure = Figure(figsize=(4.6, 0.3 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(rows)), [plain(row.provider) for row in reversed(rows)])
    return figure, axes


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
            if row == len(COSTS) - 1:
                panel.set_xlabel(axis.label)
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
