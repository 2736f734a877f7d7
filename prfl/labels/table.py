"""Labels from a table: rated videos or compared pairs, as a manifest.

    video,prompt,split,motion,text             prompt,a,b,motion
    clips/a.mp4,a dog runs,train,1,0.5         a dog runs,clips/a.mp4,clips/b.mp4,a

A column that is not ``video``, ``a``, ``b``, ``prompt``, ``split`` or ``rater`` is a dimension, unless a layout says
otherwise.  An empty cell is no answer, and a pair without any is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prfl.data.manifest import LabelledVideo, PreferencePair, parse_rows, write_manifest
from prfl.labels.answers import SWAPPED, agreement, majority
from prfl.labels.layout import Layout, check_scale, completed, manifest_row
from prfl.labels.reading import Row
from prfl.utils.errors import Faults, PrflError

SHOWN = 10  # names in a line of the summary


def import_table(
    path: Path,
    out: Path | None = None,
    layout: Layout | None = None,
    root: Path | None = None,
    skip_missing: bool = False,
) -> str:
    """Write the manifest ``out`` (default: PATH.jsonl, in ``root`` where one is given); returns a summary in words.

    root: the folder that the videos' paths are relative to; default: the table's.  skip_missing: rows whose videos are
    not there are counted and left out.  Raises PrflError with every row that is wrong; then nothing is written.
    """
    layout = layout or Layout()
    for scale in layout.scales.values():
        check_scale(scale)
    manifest = (root or path.parent) / path.with_suffix(".jsonl").name

    # Read the table in its own words.
    faults = Faults()
    table = layout.read(path, faults)
    if not table.rows:
        faults.raise_all(path)
    layout = completed(layout, table)
    kept = [row for row in table.rows if layout.keep(row[1])]
    rows: list[Row] = []
    for row in kept:
        with faults.collected():
            rows.append(manifest_row(row, layout, faults))

    # What is left out is counted and named.
    notes = (
        [f"{len(table.rows) - len(kept)} rows are left out, as their set asks"] if len(kept) < len(table.rows) else []
    )
    if skip_missing:
        rows, missing = _with_videos(rows, manifest.parent)
        notes += (
            [f"{len(missing)} rows are left out, their videos are not there: {_listed(missing)}"] if missing else []
        )
    if layout.join or "rater" in layout.columns:
        rows, joined = join_raters(rows)
        notes += [joined] if joined else []
    answered = [row for row in rows if row[1].get("preference") != {}]
    empty = [where for where, fields in rows if not (fields.get("label") or fields.get("preference"))]
    if empty:
        what = "pairs that nobody answered are left out" if layout.pairs else "videos have no label"
        notes.append(f"{len(empty)} {what}: {_lines(empty)}")
    if not answered and not faults.errors:
        fix = "write one line for each video or pair, with an answer"
        raise PrflError(_why_nothing(len(table.rows), len(rows)), where=str(path), fix=fix)

    checked = parse_rows(answered, manifest.parent / path.name, faults)
    write_manifest(out or manifest, checked)
    notes += [layout.note] if layout.note else []
    return "\n  ".join([f"{out or manifest}: {summary(checked)}", *notes])


def _why_nothing(rows: int, with_videos: int) -> str:
    if not rows:
        return "holds a header and no rows"
    if not with_videos:
        return f"none of its {rows} rows has its videos here"
    return f"nobody answered any of its {rows} pairs"


def _with_videos(rows: Sequence[Row], folder: Path) -> tuple[list[Row], list[str]]:
    """Split rows into those whose videos are there, and the names of the videos that are not."""
    there, missing = [], []
    for where, fields in rows:
        lacking = [
            fields[name] for name in ("video", "a", "b") if name in fields and not (folder / fields[name]).is_file()
        ]
        if lacking:
            missing.append(lacking[0])
        else:
            there.append((where, fields))
    return there, missing


def join_raters(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """Make one row of all answers to one video or pair: the majority of choices, the mean of ratings.

    A pair that was shown the other way round is turned.  Returns the rows, and how far raters agree, in words.
    """
    groups: dict[tuple[str, frozenset[str]], list[Row]] = {}
    for row in rows:
        _, fields = row
        videos = frozenset(fields[name] for name in ("video", "a", "b") if name in fields)
        groups.setdefault((fields["prompt"], videos), []).append(row)

    joined_rows: list[Row] = []
    answers: dict[str, list[list[Any]]] = {}
    for group in groups.values():
        where, first = group[0]
        kind = "preference" if "a" in first else "label"
        by_dimension: dict[str, list[Any]] = {}
        for _, fields in group:
            turned = kind == "preference" and fields["a"] != first["a"]
            for name, value in fields[kind].items():
                by_dimension.setdefault(name, []).append(SWAPPED[value] if turned else value)
        for name, values in by_dimension.items():
            answers.setdefault(name, []).append(values)
        join = majority if kind == "preference" else _mean
        joined_rows.append((where, {**first, kind: {name: join(values) for name, values in by_dimension.items()}}))

    shares = {name: agreement(values) for name, values in answers.items()}
    told = [f"{name} {share:.2f} of {count}" for name, (share, count) in shares.items() if count]
    return joined_rows, f"raters agree (share of pairs of answers to the same): {', '.join(told)}" if told else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _lines(rows: Sequence[str]) -> str:
    """List rows by their numbers.  rows: each as FILE:LINE, or FILE: row N."""
    word = "row" if ": row " in rows[0] else "line"
    return f"{word} {_listed([row.replace(' row ', '').rpartition(':')[2] for row in rows])}"


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
