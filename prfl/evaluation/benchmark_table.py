"""The table that ``prfl eval --benchmark`` prints: what was measured, beside what others published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from prfl.reward.checkpoint_schema import BenchmarkScores


@dataclass(frozen=True)
class Published:
    """Somebody's figures, in per cent, on the whole set; None where they give none.  sigma: as they put it."""

    who: str
    dimension: str
    sigma: str
    accuracy: float | None
    accuracy_ties: float | None


def benchmark_table(measured: Mapping[str, BenchmarkScores], published: Sequence[Published]) -> Table:
    """Make a table with one line a reward, dimension and noise level; the published figures stand below."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("reward", "dimension"):
        table.add_column(name, overflow="fold")
    for name in ("sigma", "without ties", "with ties", "pairs", "ties"):
        table.add_column(name, justify="right")
    for name, scores in measured.items():
        for dimension, by_sigma in scores.accuracy.items():
            counts = str(scores.decided[dimension]), str(scores.ties[dimension])
            for sigma, value in by_sigma.items():
                with_ties = scores.accuracy_ties[dimension][sigma]
                table.add_row(name, dimension, sigma, f"{value:.2%}", f"{with_ties:.2%}", *counts)
    if published:
        table.add_section()
        table.add_row("published:", style="dim")
    for each in published:
        cells = ("-" if value is None else f"{value:.2f}%" for value in (each.accuracy, each.accuracy_ties))
        table.add_row(each.who, each.dimension, each.sigma, *cells, "", "")
    return table
