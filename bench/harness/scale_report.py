"""Lines of a table that say what a step costs against one axis: one a provider, its costs side by side."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases.scale import COSTS, Curve, Line, curves, fit
from bench.harness.results import Row

HEAD = ("step", *(f"{cost.label}, {cost.unit}" for cost in COSTS.values()), "rounds")
NOTE = (
    "Each cost at the smallest and at the largest value; then, by a fitted line, what one unit more costs (time with a "
    "95 % interval over rounds) and the share of the differences that the line explains. Flat: within 5 % all along. "
    "No line: it explains less than 90 %, or has fewer than three points. One gradient step is held while the reward "
    "is scored, several are walked back to: their lines start at 2."
)


def tables(rows: Sequence[Row]) -> dict[str, list[list[str]]]:
    """Write a table for each axis, by title: one line for each provider, under ``HEAD``."""
    by_title: dict[str, list[list[str]]] = {}
    for curve in curves(rows):
        rounds = sorted({len(row.rounds) for row in curve.rows})
        spread = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
        line = [curve.provider, *(cell(fit(curve, cost)) for cost in COSTS), spread]
        by_title.setdefault(title(curve), []).append(line)
    return by_title


def title(curve: Curve) -> str:
    first, last = curve.values[curve.first], curve.values[-1]
    info = curve.rows[0].info
    where = f"{info['settings']['world']}, {info['device']}"
    return f"{curve.axis.label} {first} to {last} ({where}), per {curve.axis.unit}"


def cell(line: Line | None) -> str:
    """Write a line's figures: 41 to 120: +6.7 [6.1, 7.2], 98 %."""
    if line is None:
        return "-"
    ends = f"{figures(line.costs[line.first])} to {figures(line.costs[-1])}"
    if not line.straight:
        return f"{ends}: no line"
    slope = f"{'+' if line.slope > 0 else ''}{figures(line.slope)}"
    if line.interval:
        slope += f" [{figures(line.interval.low)}, {figures(line.interval.high)}]"
    if line.flat or line.explained is None:
        return f"{ends}: {slope}, flat"
    return f"{ends}: {slope}, {100 * line.explained:.0f} %"


def figures(value: float) -> str:
    """Write three significant figures, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 1e-4 else "0"
