"""How a table of labels is laid out: which column is the prompt, which the videos, which are answers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prfl.data.manifest import Choice
from prfl.labels.answers import choice_of, compared, is_empty, number_of, rating_of
from prfl.labels.reading import Row, Table, read_table
from prfl.utils.errors import Faults, PrflError
from prfl.utils.text import closest

PAIR, VIDEO = ("prompt", "a", "b"), ("video", "prompt")
FIELDS = ("prompt", "video", "a", "b", "split", "rater")
NAMES = {
    "prompt": "prompt caption textprompt videoprompt framecaption",
    "a": "a videoa patha video1 path1 video1path pathvideo1 left leftvideo leftpath filea filename1",
    "b": "b videob pathb video2 path2 video2path pathvideo2 right rightvideo rightpath fileb filename2",
    "video": "video videopath path file filename",
    "split": "split subset",
    "rater": "rater raterid annotator annotatorid worker workerid user userid email",
}
"""Names under which a column is known for what it holds, without case, blanks and marks."""
SPLITS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
"""Words for the splits; ``test_v1`` is a test split too."""


@dataclass(frozen=True)
class Layout:
    """What is what in a table; empty: what the columns' names say.

    columns: the column of each of FIELDS, or a path made of columns, as ``videos/{id}.mp4``.  dimensions: the column of
    each dimension, or two with scores of both sides, as ``score_a:score_b``; empty: every other column.
    scales: the worst and best rating of a dimension, of all others under "".  margin: two scores that differ by no more
    are a tie.  split: of all rows.  keep: which rows count.  read: file to table.  join: several raters of one video or
    pair are joined.  note: what a user of this layout should know.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    dimensions: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    margin: float = 0.0
    split: str | None = None
    keep: Callable[[dict[str, Any]], bool] = lambda row: True
    read: Callable[[Path, Faults], Table] = read_table
    join: bool = False
    note: str = ""

    @property
    def pairs(self) -> bool:
        return "a" in self.columns

    def scale(self, dimension: str) -> tuple[float, float]:
        return self.scales.get(dimension, self.scales.get("", (0.0, 1.0)))


def completed(layout: Layout, table: Table) -> Layout:
    """Fill in what the layout leaves to the names of the columns.

    Raises PrflError for a column that is not there, and for a table that is neither of videos nor of pairs, or of both.
    """
    columns = {name: column for name, column in layout.columns.items() if column}
    for name in FIELDS:
        if name not in columns and (column := known_as(name, table.columns)):
            columns[name] = column
    for name, column in columns.items():
        _check_column(column, table, f"--columns {name}=")

    # A pair has two sides; a table may name both kinds only if the layout was told which it is.
    if "video" in columns and not {"a", "b"}.isdisjoint(columns):
        kind = PAIR if {"a", "b"} & layout.columns.keys() else VIDEO if "video" in layout.columns else ()
        if not kind:
            raise PrflError(
                "the header is of a video and of a pair", where=table.where, fix="name one: --columns a=..."
            )
        columns = {name: column for name, column in columns.items() if name in (*kind, "split", "rater")}
    needed = VIDEO if {"a", "b"}.isdisjoint(columns) else PAIR
    if missing := [name for name in needed if name not in columns]:
        what = f"the header has no column {' and no '.join(missing)}"
        fix = f"a first line as {','.join(needed)},split,motion; or --columns {missing[0]}=COLUMN"
        raise PrflError(f"{what}{_there(table)}", where=table.where, fix=fix)

    used = {*columns.values(), *layout.ignore}
    for column in layout.ignore:
        _check_column(column, table, "--ignore ")
    dimensions = layout.dimensions or {name: name for name in table.columns if name not in used}
    for column in dimensions.values():
        for side in column.split(":") if column not in table.columns else [column]:
            _check_column(side, table, "--dimensions ")
    if not dimensions:
        fix = f"a first line as {','.join(needed)},split,motion"
        raise PrflError("the header names no dimension that is labelled", where=table.where, fix=fix)
    if unknown := layout.scales.keys() - dimensions.keys() - {""}:
        fix = f"one of {', '.join(dimensions)}"
        raise PrflError(f"there is no dimension '{sorted(unknown)[0]}'", where="--scale", fix=fix)
    return replace(layout, columns=columns, dimensions=dimensions)


def known_as(name: str, columns: Sequence[str]) -> str | None:
    """Return the column that is known for holding a field; the field's own name goes before others."""
    if name in columns:
        return name
    spellings = NAMES[name].split()
    return next((column for column in columns if re.sub(r"[^a-z0-9]", "", column.lower()) in spellings), None)


def _check_column(column: str, table: Table, option: str) -> None:
    """Raise PrflError for a column, or one inside a path made of columns, that the table lacks."""
    for name in re.findall(r"{([^}:!]*)", column) or [column]:
        if name not in table.columns:
            close = closest(name, table.columns)
            fix = f"did you mean '{close}'?" if close else f"the columns are {', '.join(table.columns)[:300]}"
            raise PrflError(f"there is no column '{name}' ({option}{column})", where=table.where, fix=fix)


def _there(table: Table) -> str:
    return f" (it has {', '.join(table.columns)[:200]})" if table.columns else ""


def manifest_row(row: Row, layout: Layout, faults: Faults) -> tuple[str, dict[str, Any]]:
    """Write a row as it would stand in a JSONL manifest; an empty cell is no answer.  layout: completed.

    What is wrong with its paths and prompt, ``parse_rows`` says.  Answers in no known words go to ``faults``.
    Raises PrflError for a path that cannot be made of the columns.
    """
    where, cells = row
    fields = {name: _text(cells, layout.columns[name], where) for name in (PAIR if layout.pairs else VIDEO)}
    if split := layout.split or _split(cells.get(layout.columns.get("split", ""))):
        fields["split"] = split

    answers: dict[str, Any] = {}
    for dimension in layout.dimensions:
        with faults.collected():
            answer = _answer(cells, layout, dimension, where)
            if answer is not None:
                answers[dimension] = answer
    return where, {**fields, ("preference" if layout.pairs else "label"): answers}


def _answer(cells: Mapping[str, Any], layout: Layout, dimension: str, where: str) -> Choice | float | None:
    """Read what a row says of a dimension; None where it says nothing.  Raises PrflError."""
    column = layout.dimensions[dimension]
    sides = [column] if column in cells or ":" not in column else column.split(":")
    values = [cells.get(side) for side in sides]
    if any(map(is_empty, values)):
        return None
    if len(sides) == 2:
        first, second = (number_of(side, value, where) for side, value in zip(sides, values, strict=True))
        return compared((first, second), layout.margin)
    if layout.pairs:
        return choice_of(dimension, values[0], where)
    return rating_of(dimension, values[0], layout.scale(dimension), where)


def _text(cells: Mapping[str, Any], column: str, where: str) -> str:
    """Return a cell's text, or the path that is made of several cells."""
    if "{" not in column:
        value = cells.get(column)
        return "" if is_empty(value) else str(value)
    try:
        return re.sub(r"{([^}:]*)(:[^}]*)?}", lambda part: format(cells[part[1]], (part[2] or ":")[1:]), column)
    except (KeyError, ValueError, TypeError) as error:
        raise PrflError(f"'{column}' cannot be filled in: {error}", where=where, fix="mend this row") from error


def _split(value: Any) -> str | None:
    """Return the split that a word means; a word that is none is returned as it is, for ``parse_rows`` to refuse."""
    if is_empty(value):
        return None
    word = re.split(r"[^a-z]", str(value).lower())[0]
    return next((split for split, words in SPLITS.items() if word in words.split()), str(value))


def check_scale(scale: tuple[float, float]) -> None:
    """Raise PrflError for a scale whose ends are one, or not finite."""
    if not 0 < abs(scale[1] - scale[0]) < math.inf:
        fix = "worst:best, as 1:5"
        raise PrflError(f"{scale[0]:g} to {scale[1]:g} is no scale", where="--scale", fix=fix)
