"""Answers of several people to the same pairs as one manifest, with how far they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from prfl.data.manifest import PreferencePair, parse_rows, write_manifest
from prfl.labels.answers import SWAPPED
from prfl.labels.reading import Row
from prfl.labels.table import join_raters, summary
from prfl.utils.errors import Faults, PrflError
from prfl.utils.reading import json_rows

MERGED = "preferences.jsonl"


def merge(files: Sequence[Path], root: Path | None = None, out: Path | None = None) -> str:
    """Write one row a pair to ``out`` (default: preferences.jsonl in root): the side with more votes, else a tie.

    files: as the page saves them; one without a rater's name is the answers of somebody of its own name.  root: the
    folder of the videos; default: that of the first file.  A rater who stands in several files counts once a pair, as
    the last file has it.  Returns a summary in words.  Raises PrflError with every row that is wrong.
    """
    root = files[0].parent if root is None else root
    rows, faults = [], Faults()
    for file in files:
        with faults.collected():
            rows += json_rows(file)
    faults.raise_all("prfl labels merge", "files")
    checked = parse_rows(rows, root / MERGED)
    if not isinstance(checked[0], PreferencePair):
        fix = "the files that the labelling page saves, preferences-NAME.jsonl"
        raise PrflError("holds labelled videos, not compared pairs", where=str(files[0]), fix=fix)

    by_rater = latest(rows)
    joined, _ = join_raters([row for answers in by_rater.values() for row in answers.values()])
    merged = parse_rows(joined, root / MERGED)
    write_manifest(out or root / MERGED, merged)

    held = sum(row.split not in (None, "train") for row in merged)
    blind = "" if held else ": a reward that is trained on them cannot be measured"
    lines = [f"{out or root / MERGED}: {summary(merged)}", f"{held} of the pairs are held out{blind}"]
    lines += [f"{rater}: {told(list(answers.values()))}" for rater, answers in by_rater.items()]
    return "\n  ".join(lines + agreements(by_rater))


def latest(rows: Sequence[Row]) -> dict[str, dict[tuple[str, frozenset[str]], Row]]:
    """Sort rows by rater, one a pair: the last one.  A row without a rater is of its file; Ann and ann are one."""
    by_rater: dict[str, dict[tuple[str, frozenset[str]], Row]] = {}
    spelling: dict[str, str] = {}
    for where, fields in rows:
        rater = fields.get("rater") or Path(where.rpartition(":")[0]).stem
        rater = spelling.setdefault(rater.casefold(), rater)
        pair = fields["prompt"], frozenset((fields["a"], fields["b"]))
        by_rater.setdefault(rater, {})[pair] = where, fields
    return by_rater


def told(rows: Sequence[Row]) -> str:
    """Count one rater's answers.  How often the left one was better shows a habit: about half is none."""
    counts = Counter(choice for _, fields in rows for choice in fields["preference"].values())
    bad = sum(len(fields.get("both_bad", ())) for _, fields in rows)
    decided = counts["a"] + counts["b"]
    left = f"left {counts['a'] / decided:.0%} of {decided} decided, " if decided else ""
    return f"{len(rows)} pairs, {left}{counts['tie']} ties ({bad} of them both bad)"


def agreements(by_rater: dict[str, dict[tuple[str, frozenset[str]], Row]]) -> list[str]:
    """Say, for every two raters with a pair in common, how often they gave it the same answer, by dimension."""
    lines = []
    for first, second in combinations(by_rater, 2):
        same: dict[str, list[bool]] = {}
        for pair in by_rater[first].keys() & by_rater[second].keys():
            mine, other = by_rater[first][pair][1], by_rater[second][pair][1]
            turned = mine["a"] != other["a"]
            for name in mine["preference"].keys() & other["preference"].keys():
                choice: Any = other["preference"][name]
                same.setdefault(name, []).append(mine["preference"][name] == (SWAPPED[choice] if turned else choice))
        if same:
            shares = [f"{name} {sum(each) / len(each):.2f} of {len(each)}" for name, each in sorted(same.items())]
            lines.append(f"{first} and {second} agree: {', '.join(shares)}")
    return lines
