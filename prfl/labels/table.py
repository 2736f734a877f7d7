"""Labels from a spreadsheet: a CSV of rated videos or of compared pairs, as a manifest.

    video,prompt,split,motion,text             prompt,a,b,motion
    clips/a.mp4,a dog runs,train,1,0.5         a dog runs,clips/a.mp4,clips/b.mp4,a

A column that is not ``video``, ``a``, ``b``, ``prompt`` or ``split`` is a dimension.  An empty cell is no answer, and a
pair without any is left out.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfl.data.manifest import LabelledVideo, PreferencePair, parse_rows, write_manifest
from prfl.utils.errors import Faults, PrflError
from prfl.utils.reading import text_of

VIDEO, PAIR = ("video", "prompt"), ("prompt", "a", "b")


def import_csv(path: Path, out: Path, scale: tuple[float, float] = (0.0, 1.0)) -> str:
    """Write the manifest ``out``; returns a summary in words.

    Paths in the CSV are relative to its folder.  scale: the lowest and the highest rating, which become 0 and 1.
    Raises PrflError with file and line of every row that is wrong; then nothing is written.
    """
    if not 0 < scale[1] - scale[0] < math.inf:
        raise PrflError(f"{scale[0]:g} to {scale[1]:g} is no scale", where="--scale", fix="worst:best, as 1:5")
    faults = Faults()
    lines = csv_rows(path, scale, faults)
    empty = [where for where, fields in lines if not (fields.get("label") or fields.get("preference"))]
    answered = [(where, fields) for where, fields in lines if fields.get("preference") != {}]
    if not answered and not faults.errors:
        what = f"nobody answered any of its {len(lines)} pairs" if lines else "holds a header and no rows"
        raise PrflError(what, where=str(path), fix="write one line for each video or pair, with an answer")
    rows = parse_rows(answered, path, faults)
    write_manifest(out, rows)
    return f"{out}: {summary(rows)}{unanswered(empty, left_out=len(answered) < len(lines))}"


def unanswered(rows: Sequence[str], left_out: bool) -> str:
    """Name the rows without an answer, for the end of the summary.  rows: each as FILE:LINE."""
    if not rows:
        return ""
    shown = ", ".join(row.rpartition(":")[2] for row in rows[:10]) + (", ..." if len(rows) > 10 else "")
    what = "pairs that nobody answered are left out" if left_out else "videos have no label"
    return f"\n  {len(rows)} {what}: line {shown}"


def csv_rows(path: Path, scale: tuple[float, float], faults: Faults) -> list[tuple[str, dict[str, Any]]]:
    """Read (``file:line``, a manifest row) of every sound line below the header.

    Raises PrflError for a header that is wrong; what is wrong with a row goes to ``faults``.
    """
    lines = csv.reader(io.StringIO(text_of(path), newline=""), dialect=_dialect(text_of(path)), strict=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    begins = 1  # the line where the row begins; a cell may have several
    try:
        header = [name.strip() for name in next(lines, [])]
        pairs = check_header(header, f"{path}:1")
        begins = lines.line_num + 1
        for cells in lines:
            where, begins = f"{path}:{begins}", lines.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            with faults.collected():
                if len(cells) != len(header):
                    what = f"has {len(cells)} cells, the header has {len(header)}"
                    raise PrflError(what, where=where, fix='put a text with commas between quotation marks: "a, b"')
                rows.append((where, _row(dict(zip(header, map(str.strip, cells), strict=True)), pairs, scale, where)))
    except csv.Error as error:
        fix = 'a quotation mark inside a text is written ""'
        faults.errors.append(PrflError(f"is not CSV: {error}", where=f"{path}:{begins}", fix=fix))  # the rest is lost
    return rows


def check_header(header: Sequence[str], where: str) -> bool:
    """Return whether the rows are pairs.  Raises PrflError for a header that is neither kind, or has no dimension."""
    pairs = not {"a", "b"}.isdisjoint(header)
    needed = PAIR if pairs else VIDEO
    missing = [name for name in needed if name not in header]
    twice = [name for name, count in Counter(header).items() if count > 1 or not name]
    dimensions = [name for name in header if name not in (*needed, "split")]
    fix = f"a first line as {','.join(needed)},split,motion"
    if missing:
        raise PrflError(f"the header has no column {' and no '.join(missing)}", where=where, fix=fix)
    if twice:
        raise PrflError(f"the column {twice[0]!r} stands twice, or has no name", where=where, fix="name each once")
    if pairs and "video" in header:
        raise PrflError("the header is of a video and of a pair", where=where, fix=fix)
    if not dimensions:
        raise PrflError("the header names no dimension that is labelled", where=where, fix=fix)
    return pairs


def _row(cells: dict[str, str], pairs: bool, scale: tuple[float, float], where: str) -> dict[str, Any]:
    """Make a row as it would stand in a JSONL manifest; what is wrong with its values, ``parse_rows`` says."""
    fields: dict[str, Any] = {name: cells.pop(name) for name in (PAIR if pairs else VIDEO)}
    if split := cells.pop("split", ""):
        fields["split"] = split
    answers = {name: text for name, text in cells.items() if text}
    if pairs:
        return {**fields, "preference": {name: text.lower() for name, text in answers.items()}}
    return {**fields, "label": {name: _rating(name, text, scale, where) for name, text in answers.items()}}


def _rating(name: str, text: str, scale: tuple[float, float], where: str) -> float:
    low, high = scale
    try:
        value = float(text)
    except ValueError:
        fix = f"a number from {low:g} to {high:g}, or an empty cell"
        raise PrflError(f"'{name}' is {text[:80]!r}, not a number", where=where, fix=fix) from None
    if not low <= value <= high:
        fix = f"a number from {low:g} to {high:g}; other scales are told by --scale, as --scale 1:5"
        raise PrflError(f"'{name}' is {text}", where=where, fix=fix)
    return (value - low) / (high - low)


def _dialect(text: str) -> type[csv.Dialect]:
    """Spreadsheets of some countries write semicolons, others tabs."""
    header = text.partition("\n")[0]

    class Detected(csv.excel):
        delimiter = max(",;\t", key=header.count)

    return Detected


def summary(rows: Sequence[LabelledVideo] | Sequence[PreferencePair]) -> str:
    """Count the answers by dimension: an import that went wrong shows here."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if isinstance(row, PreferencePair):
            for name, choice in row.preference.items():
                counts.setdefault(name, Counter())[choice] += 1
        else:
            for name, value in row.label.items():
                counts.setdefault(name, Counter())[f"{value:g}"] += 1
    kind = "pairs" if isinstance(rows[0], PreferencePair) else "videos"
    lines = [f"{len(rows)} {kind} of {len({row.prompt for row in rows})} prompts"]
    for name, answers in counts.items():
        lines.append(f"{name}: " + ", ".join(f"{value} x {count}" for value, count in sorted(answers.items())))
    return "\n  ".join(lines)
