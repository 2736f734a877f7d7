"""The table of families: what test_families.py, here and in tests/estimate, measured of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/extending.md"
BLOCK = re.compile(r"(<!-- families: python -m tests.backbone --update -->\n).*?(<!-- /families -->)", re.S)
MEASURED = "measured"
WIDTH = 100  # of a page's tables
Cell = tuple[str, str, float]
"""Family, column, value."""


def worst(cells: Iterable[Cell]) -> dict[str, dict[str, float]]:
    """Keep of each family's column the value that is furthest from what it should be."""
    table: dict[str, dict[str, float]] = {}
    for family, column, value in cells:
        row = table.setdefault(family, {})
        row[column] = max((row.get(column, value), value), key=lambda each: distance(column, each))
    return table


def distance(column: str, value: float) -> float:
    return abs(value - (1 if column.startswith("predicted") else 0))


def rendered(table: dict[str, dict[str, float]]) -> str:
    """Write it as markdown, a column for each family: the names of what is measured are long.

    Where a page has no room for all of them it is two tables.
    """
    half = (len(table) + 1) // 2
    parts = [list(table)] if len(header(table)) <= WIDTH else [list(table)[:half], list(table)[half:]]
    return "\n".join(one_table({family: table[family] for family in part}) for part in parts)


def header(families: Iterable[str]) -> str:
    return f"| {' | '.join(['measured', *(f'`{family}`' for family in families)])} |"


def one_table(table: dict[str, dict[str, float]]) -> str:
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [["measured", *(f"`{family}`" for family in table)], ["---"] * (len(table) + 1)]
    lines += [[column, *(shown(column, row.get(column)) for row in table.values())] for column in columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(column: str, value: float | None) -> str:
    if value is None:
        return ""
    if column.startswith("MB"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if column.startswith("predicted") else f"{value:.1e}" if value else "0"
