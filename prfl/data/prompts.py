"""Lists of prompts, and their one split into train, validation and test."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prfl.data.manifest import Text, checked
from prfl.utils.errors import Faults, PrflError
from prfl.utils.files import json_rows, numbered_lines

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of a list that several sets are taken from


class _PromptRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: Text


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line from a .txt file (blank lines are skipped), or ``{"prompt": ...}`` a line from a .jsonl file.

    Raises PrflError with file and line of every empty or repeated prompt, and for a file without any.
    """
    path, faults = Path(path), Faults()
    if path.suffix == ".txt":
        found = numbered_lines(path)
    elif path.suffix == ".jsonl":
        found = []
        for where, fields in json_rows(path):
            with faults.collected():
                found.append((where, checked(_PromptRow, fields, where).prompt))
    else:
        raise PrflError("is neither .txt nor .jsonl", where=str(path), fix="one prompt a line in a .txt file")
    if not found and not faults.errors:
        raise PrflError("holds no prompts", where=str(path), fix="write one prompt on each line")
    first: dict[str, str] = {}
    for where, prompt in found:
        with faults.collected():
            if first.setdefault(prompt, where) != where:
                fix = "remove one; a prompt counts once"
                raise PrflError(f"the prompt {prompt[:80]!r} stands already at {first[prompt]}", where=where, fix=fix)
    faults.raise_all(path)
    return list(first)


def split_prompts(prompts: Sequence[str], names: Sequence[str] = tuple(SHARES)) -> dict[str, list[str]]:
    """One list's prompts for each of ``names``, in proportion to ``SHARES``, each in the order given.

    A prompt's place depends on a hash of its text, not on its line: reordering the list changes nothing.  Prompts that
    differ only in how they are written (``plain``) stay together.
    Raises PrflError where a set would be empty.
    """
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    shares = [SHARES[name] for name in names]
    unlike = list(dict.fromkeys(plain(prompt) for prompt in order))
    bounds = [round(len(unlike) * sum(shares[:end]) / sum(shares)) for end in range(len(names) + 1)]
    parts = zip(names, pairwise(bounds), strict=True)
    home = {text: name for name, (start, end) in parts for text in unlike[start:end]}
    chosen = {name: [prompt for prompt in prompts if home[plain(prompt)] == name] for name in names}
    for name, some in chosen.items():
        if not some:
            fix = "more prompts, or a file for each set"
            raise PrflError(f"{len(prompts)} prompts, split among {', '.join(names)}, leave {name} empty", fix=fix)
    return chosen


@lru_cache(maxsize=2**17)  # a list is split at several places of a start
def plain(prompt: str) -> str:
    """A prompt without its case, its spaces, its Unicode form, signs that nobody sees, and a full stop at its end."""
    text = unicodedata.normalize("NFKC", prompt).casefold()
    seen = "".join(" " if sign.isspace() else sign for sign in text if unicodedata.category(sign) != "Cf")
    return " ".join(seen.split()).rstrip(" .。")
