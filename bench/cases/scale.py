"""What a step costs against one axis of its size: the points, a fitted line, and whether that is flat.

Rows of scale are those whose case has the settings ``axis`` and ``value``; everything else stands at the world's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.results import Row, medians
from prfl.evaluation.metrics import Interval, bootstrap

HELD = "gradients", 1  # of one gradient step the edge is held while the reward is scored: another form than of several
LINEAR, POINTS = 0.9, 3  # a line that explains less of the differences, or has fewer points, is called none
FLAT = 0.05  # a line that rises or falls by no more than this share of its largest value is called flat


class Axis(NamedTuple):
    label: str
    unit: str


class Cost(NamedTuple):
    label: str
    unit: str
    of: Callable[[Row], float | None]


AXES = {
    "frames": Axis("frames", "frame"),
    "resolution": Axis("resolution", "1,000 pixels"),
    "steps": Axis("solver steps", "solver step"),
    "gradients": Axis("gradient steps", "gradient step"),
    "batch": Axis("batch", "sample"),
}
COSTS = {
    "time": Cost("time", "ms", lambda row: row.info["milliseconds"]["median"]),
    "peak": Cost("peak memory", "MiB", lambda row: _mebibytes(row.info["memory"].get("peak"))),
    "saved": Cost("saved for backward", "MiB", lambda row: _mebibytes(row.info["saved_bytes"])),
}


def _mebibytes(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def amount(value: Any) -> float:
    """Return where a value stands on its axis: a number itself, a frame's HEIGHTxWIDTH in thousands of pixels."""
    return math.prod(map(int, value.split("x"))) / 1000 if isinstance(value, str) else float(value)


def on_axis(row: Row) -> bool:
    return row.info["settings"].get("axis") in AXES


@dataclass(frozen=True)
class Curve:
    """One provider along one axis, on one machine.  rows: by rising amount."""

    rows: Sequence[Row]

    @property
    def axis(self) -> Axis:
        return AXES[self.rows[0].info["settings"]["axis"]]

    @property
    def values(self) -> list[Any]:
        return [row.info["settings"]["value"] for row in self.rows]

    @property
    def first(self) -> int:
        """Return the row that a line starts from: what is of another form is no point of it."""
        settings = self.rows[0].info["settings"]
        return int((settings["axis"], settings["value"]) == HELD)

    @property
    def provider(self) -> str:
        return self.rows[0].provider


def curves(rows: Iterable[Row]) -> list[Curve]:
    """Group the rows of scale by machine, world, axis and provider; fewer than two values make no curve."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in filter(on_axis, rows):
        settings = row.info["settings"]
        key = row.info["machine"], row.info["operation"], settings["world"], settings["axis"], row.provider
        groups.setdefault(key, []).append(row)
    ordered = (sorted(group, key=lambda row: amount(row.info["settings"]["value"])) for group in groups.values())
    return [Curve(group) for group in ordered if len(group) > 1]


def by_world(rows: Iterable[Row]) -> list[list[Curve]]:
    """Group the curves by what one figure shows: one machine and one world."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves(rows):
        info = curve.rows[0].info
        groups.setdefault((info["machine"], info["settings"]["world"]), []).append(curve)
    return list(groups.values())


@dataclass(frozen=True)
class Line:
    """cost = start + slope amount, by least squares.

    interval: the slope's, over rounds; None for bytes, which are counted once.  explained: the share of the costs'
    variance (R squared); None where they do not vary.  costs: what the line is fitted to, from ``first`` on.
    """

    start: float
    slope: float
    interval: Interval | None
    explained: float | None
    amounts: list[float]
    costs: list[float]
    first: int = 0

    def at(self, amount: float) -> float:
        return self.start + self.slope * amount

    @property
    def flat(self) -> bool:
        ends = self.at(self.amounts[self.first]), self.at(self.amounts[-1])
        return abs(ends[1] - ends[0]) <= FLAT * max(map(abs, ends))

    @property
    def straight(self) -> bool:
        """Return whether there is a line at all."""
        enough = len(self.costs) - self.first >= POINTS
        return self.flat or self.explained is None or (enough and self.explained >= LINEAR)


def fit(curve: Curve, cost: str) -> Line | None:
    """Fit a line through a curve's medians (``COSTS``); None where a row has no such figure."""
    amounts = [amount(value) for value in curve.values]
    figures = [COSTS[cost].of(row) for row in curve.rows]
    costs = [each for each in figures if each is not None]
    if len(costs) < len(figures):
        return None
    first = curve.first if len(costs) - curve.first > 1 else 0
    x, y = (torch.tensor(each[first:], dtype=torch.float64) for each in (amounts, costs))
    slope = float(_slopes(x, y[None]))
    start = float(y.mean() - slope * x.mean())
    spread = float((y - y.mean()).square().sum())
    explained = 1 - float((y - start - slope * x).square().sum()) / spread if spread else None
    interval = slope_interval(x, [row.info["rounds_ms"] for row in curve.rows[first:]]) if cost == "time" else None
    return Line(start, slope, interval, explained, amounts, costs, first)


def slope_interval(x: Tensor, rounds: Sequence[Sequence[float]]) -> Interval:
    """Compute the slope of the medians, with an interval over rounds, which are independent between values."""
    sizes = [len(of_value) for of_value in rounds]
    values = [torch.tensor(of_value, dtype=torch.float64) for of_value in rounds]

    def slopes(times: Tensor) -> Tensor:
        parts = times.split(sizes, dim=1)
        return _slopes(x, torch.stack([medians(t, v) for t, v in zip(parts, values, strict=True)], dim=1))

    return bootstrap(slopes, sum(sizes))


def _slopes(x: Tensor, y: Tensor) -> Tensor:
    """Compute slopes by least squares.  x: (values,); y: (r, values)."""
    away = x - x.mean()
    return (y * away).sum(1) / away.square().sum()
