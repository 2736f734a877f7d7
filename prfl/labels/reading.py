"""Read a table of labels as it comes: CSV, TSV, JSON, JSON lines or parquet, as rows of named values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfl.utils.errors import Faults, PrflError
from prfl.utils.reading import json_rows, text_of

Row = tuple[str, dict[str, Any]]  # where it stands, as FILE:LINE or FILE: row N; and its values by column
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Table:
    """Rows with the names of all their columns.  where: what an error about the columns names."""

    where: str
    columns: list[str]
    rows: list[Row]


def read_table(path: Path, faults: Faults) -> Table:
    """Read all sound rows of a file; what is wrong with a row goes to ``faults``.

    A column inside another (``{"vote": {"motion": "A"}}``) is named ``vote.motion``.  Text is stripped.
    Raises PrflError for a file that is none of the kinds, or cannot be read.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        return table_of(path, _parquet_rows(path))
    if kind in (".json", ".jsonl"):
        return table_of(path, json_objects(path))
    if kind in (".csv", ".tsv", ".txt"):
        return read_csv(path, faults)
    raise PrflError(
        f"'{kind}' is no table that prfl reads", where=str(path), fix=f"save it as one of {', '.join(KINDS)}"
    )


def table_of(path: Path, rows: Sequence[Row]) -> Table:
    """Make a table of objects, whose columns are all that any of them has."""
    flat_rows = [(where, flat(row)) for where, row in rows]
    columns = dict.fromkeys(name for _, row in flat_rows for name in row)
    return Table(str(path), list(columns), flat_rows)


def json_objects(path: Path) -> list[Row]:
    """Read the objects of a JSON list, or of a file with one on each line, as they are."""
    if path.suffix.lower() == ".jsonl":
        return json_rows(path)
    try:
        content = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise PrflError(f"is not JSON: {error}", where=str(path), fix="export the table again, as JSON") from error

    # A dictionary of objects by their names is a list whose rows know their name.
    if isinstance(content, dict) and content and all(isinstance(value, dict) for value in content.values()):
        content = [{"id": name, **value} for name, value in content.items()]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    rows = []
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise PrflError(f"is a {type(row).__name__}, not an object", where=where, fix='write {"prompt": ..., ...}')
        rows.append((where, row))
    return rows


def flat(row: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Name what lies in inner objects by the path to it; strip text."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            columns |= flat(value, f"{above}{name}.")
        else:
            columns[f"{above}{name}"] = value.strip() if isinstance(value, str) else value
    return columns


def read_csv(path: Path, faults: Faults) -> Table:
    """Read every sound line below the header; rows are named as ``file:line``.

    Raises PrflError for a header with a nameless or repeated column; what is wrong with a row goes to ``faults``.
    """
    text = text_of(path)
    lines = csv.reader(io.StringIO(text, newline=""), dialect=_dialect(text), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    begins = 1  # the line where the row begins; a cell may have several
    try:
        header = [name.strip() for name in next(lines, [])]
        _check_names(header, f"{path}:1")
        begins = lines.line_num + 1
        for cells in lines:
            where, begins = f"{path}:{begins}", lines.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            with faults.collected():
                if len(cells) != len(header):
                    what = f"has {len(cells)} cells, the header has {len(header)}"
                    raise PrflError(what, where=where, fix='put a text with commas between quotation marks: "a, b"')
                rows.append((where, dict(zip(header, map(str.strip, cells), strict=True))))
    except csv.Error as error:
        fix = 'a quotation mark inside a text is written ""'
        faults.errors.append(PrflError(f"is not CSV: {error}", where=f"{path}:{begins}", fix=fix))  # the rest is lost
    return Table(f"{path}:1", header, rows)


def _check_names(header: Sequence[str], where: str) -> None:
    twice = [name for name in header if header.count(name) > 1 or not name]
    if twice:
        raise PrflError(f"the column {twice[0]!r} stands twice, or has no name", where=where, fix="name each once")


def _dialect(text: str) -> type[csv.Dialect]:
    """Spreadsheets of some countries write semicolons, others tabs."""
    header = text.partition("\n")[0]

    class Detected(csv.excel):
        delimiter = max(",;\t", key=header.count)

    return Detected


def _parquet_rows(path: Path) -> list[Row]:
    """Read a parquet file; bytes inside it (embedded videos) are left alone."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        fix = "pip install pyarrow (or prfl[parquet]), or save the table as CSV"
        raise PrflError("reading parquet needs the package pyarrow", where=str(path), fix=fix) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except FileNotFoundError as error:
        raise PrflError("there is no such file", where=str(path), fix="name another file") from error
    except (OSError, ArrowException) as error:
        raise PrflError(f"is not a parquet file: {error}", where=str(path), fix="download it again") from error
    return [(f"{path}: row {number}", row) for number, row in enumerate(rows, start=1)]
