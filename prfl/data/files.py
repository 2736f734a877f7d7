"""Small habits with files: write whole or not at all, hash contents, read lines of JSON with their numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prfl.errors import PrflError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to write to; it takes path's name at the end, or vanishes on any error.

    So a reader sees the old file, the new one or none, never a half.  The name keeps its suffix.
    Raises PrflError when the folder cannot be made or the disk is full.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        fix = "free some space or choose another folder; what was written before is whole"
        raise PrflError(f"cannot be written: {error.strerror or error}", where=str(path), fix=fix) from error
    finally:
        temporary.unlink(missing_ok=True)


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes.  Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would silently keep the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key '{repeated}' stands twice")
    return found


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """(``file:line``, text) of every line that is not blank, stripped.  Raises PrflError."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors begin a file with this mark
    except OSError as error:
        raise PrflError(f"cannot be read: {error.strerror}", where=str(path)) from error
    lines = []
    for number, raw in enumerate(data.split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise PrflError("is not UTF-8 text", where=where, fix="save the file as UTF-8") from error
        if text:
            lines.append((where, text))
    return lines


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of every line of a JSONL file.  Raises PrflError."""
    rows = []
    for where, text in numbered_lines(path):
        try:
            row = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise PrflError(f"is not JSON: {error}", where=where, fix="write one JSON object on each line") from error
        if not isinstance(row, dict):
            raise PrflError(f"is a {type(row).__name__}, not an object", where=where, fix='write {"prompt": ..., ...}')
        rows.append((where, row))
    return rows


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a remedy: the nearest known word, and all of them."""
    near = get_close_matches(word, known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return f"{guess}known: {', '.join(known)}"
