"""The answers of several raters, each in a file of their own, which is whole after every answer."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from prfl.data.manifest import Choice, checked
from prfl.labels.pairs import Pair
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.reading import json_rows

Rater = Annotated[str, Field(min_length=1, max_length=60)]


class _Answer(BaseModel):
    """A row of a manifest of pairs, signed; without a preference where an answer was taken back."""

    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: str
    a: str
    b: str
    split: str | None = None
    rater: Rater
    preference: dict[str, Choice]
    both_bad: list[str] = []


class Collection:
    """What every rater answered so far.  Methods may be called from several threads.

    folder: of the videos; the files are ``preferences-NAME-HASH.jsonl`` in it, and what they hold is gone on with.
    """

    def __init__(self, folder: Path, pairs: Sequence[Pair], dimensions: Sequence[str]) -> None:
        self.folder, self.dimensions = folder, set(dimensions)
        self.pairs = {(pair.a, pair.b): pair for pair in pairs}
        self.lock = threading.Lock()
        self.rows: dict[Path, dict[tuple[str, str], dict[str, Any]]] = {}

    def file(self, rater: str) -> Path:
        """Name a rater's file: a name that any disk takes, the same for Ann and ann, and nobody else's."""
        name = rater.casefold()
        word = re.sub(r"\W+", "-", name).strip("-")[:40]
        return self.folder / f"preferences-{word}-{hashlib.sha256(name.encode()).hexdigest()[:6]}.jsonl"

    def of(self, rater: str) -> list[dict[str, Any]]:
        """List the rows that a rater answered, those of pairs that are not asked any more too.

        Raises PrflError for a name that is none, and for a file that cannot be read.
        """
        if not 0 < len(rater) <= 60:
            raise PrflError("a rater has a name of 1 to 60 letters", fix="give one")
        with self.lock:
            return list(self._known(self.file(rater)).values())

    def put(self, fields: Any) -> tuple[str, int]:
        """Take an answer, in the place of the rater's earlier one to that pair.

        Their file is written anew before this returns: the rater, and how many pairs they answered in all dimensions.
        Raises PrflError for what is no answer to what is asked.
        """
        if not isinstance(fields, dict):
            raise PrflError("an answer is an object", fix="send what the page sends")
        answer = checked(_Answer, fields, "the answer")
        pair = self.pairs.get((answer.a, answer.b))
        if pair is None:
            raise PrflError("this pair is not asked", fix="load the page again")
        if strange := (answer.preference.keys() | set(answer.both_bad)) - self.dimensions:
            raise PrflError(f"'{min(strange)}' is not asked", fix="load the page again")

        bad = {"both_bad": answer.both_bad} if answer.both_bad else {}
        row = {**pair.row, "preference": answer.preference, **bad, "rater": answer.rater}
        file = self.file(answer.rater)
        with self.lock:
            rows = {**self._known(file), (pair.a, pair.b): row}
            if not answer.preference:
                del rows[pair.a, pair.b]
            with atomic_write(file) as temporary:
                temporary.write_text("".join(map(line_of, rows.values())), encoding="utf-8")
            self.rows[file] = rows  # not before it is on the disk
        return answer.rater, sum(row["preference"].keys() >= self.dimensions for row in rows.values())

    def counts(self) -> dict[Path, int]:
        """Count the rows of every file that was written or read."""
        with self.lock:
            return {file: len(rows) for file, rows in self.rows.items() if rows}

    def _known(self, file: Path) -> dict[tuple[str, str], dict[str, Any]]:
        """Read a rater's file the first time that it is asked for."""
        if file not in self.rows:
            rows = {}
            for where, fields in json_rows(file) if file.is_file() else []:
                answer = checked(_Answer, fields, where)
                rows[answer.a, answer.b] = fields
            self.rows[file] = rows
        return self.rows[file]


def line_of(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
