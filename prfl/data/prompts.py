"""Lists of prompts, and their one split into train, validation and test."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prfl.backbone.condition import Ask
from prfl.data.manifest import Text, checked
from prfl.utils.errors import Faults, PrflError
from prfl.utils.reading import json_rows, numbered_lines

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # each set's share of a list that is split among several sets


class _PromptRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: Text
    image: Text | None = None


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts, one per line: plain text in a .txt file, ``{"prompt": ...}`` in a .jsonl file.

    Blank lines are skipped.  A row of a .jsonl file may also have an "image", the first frame: the path of a picture or
    a video, relative to the folder of the .jsonl file.
    Raises PrflError with file and line of every empty or repeated prompt, and for a file without prompts.
    """
    path, faults = Path(path), Faults()
    if path.suffix == ".txt":
        numbered = numbered_lines(path)
    elif path.suffix == ".jsonl":
        numbered = []
        for where, fields in json_rows(path):
            with faults.collected():
                numbered.append((where, _with_image(checked(_PromptRow, fields, where), path.parent)))
    else:
        raise PrflError("is neither .txt nor .jsonl", where=str(path), fix="one prompt a line in a .txt file")
    if not numbered and not faults.errors:
        raise PrflError("holds no prompts", where=str(path), fix="write one prompt on each line")

    first: dict[str, str] = {}
    for where, prompt in numbered:
        with faults.collected():
            if first.setdefault(str(prompt), where) != where:
                fix = "remove one; a prompt counts once, whatever its image: say in words in what they differ"
                fix = fix if isinstance(prompt, Ask) else "remove one; a prompt counts once"
                what = f"the prompt {prompt[:80]!r} stands already at {first[str(prompt)]}"
                raise PrflError(what, where=where, fix=fix)
    faults.raise_all(path)
    return [prompt for _, prompt in numbered]


def _with_image(row: _PromptRow, folder: Path) -> str:
    return row.prompt if row.image is None else Ask(row.prompt, folder / row.image)


def split_prompts(prompts: Sequence[str], names: Sequence[str] = tuple(SHARES)) -> dict[str, list[str]]:
    """Split a list of prompts among the sets ``names``, in proportion to ``SHARES``.  Each set keeps the list's order.

    A prompt's set depends on a hash of its text and not on its line, so reordering the list changes nothing.  Prompts
    that differ only in how they are written (``plain``) go to the same set.
    Raises PrflError where a set would be empty.
    """
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    texts = list(dict.fromkeys(plain(prompt) for prompt in order))

    # Each set takes a contiguous part of the hashed order.
    shares = [SHARES[name] for name in names]
    bounds = [round(len(texts) * sum(shares[:end]) / sum(shares)) for end in range(len(names) + 1)]
    set_of: dict[str, str] = {}
    for name, (start, end) in zip(names, pairwise(bounds), strict=True):
        set_of |= dict.fromkeys(texts[start:end], name)

    sets: dict[str, list[str]] = {name: [] for name in names}
    for prompt in prompts:
        sets[set_of[plain(prompt)]].append(prompt)
    for name, chosen in sets.items():
        if not chosen:
            fix = "more prompts, or a file for each set"
            raise PrflError(f"{len(prompts)} prompts, split among {', '.join(names)}, leave {name} empty", fix=fix)
    return sets


def hold_out(prompts: Sequence[str], share: float) -> set[str]:
    """Choose the prompts to hold out: a ``share`` of the list, chosen by a hash of each prompt's text.

    If ``share`` is above 0 and there are two prompts or more, at least one is held out.  Never are all of them held
    out.  Prompts that differ only in how they are written (``plain``) stay together.
    """
    texts = sorted({plain(prompt) for prompt in prompts}, key=lambda text: hashlib.sha256(text.encode()).digest())
    count = min(max(1, round(share * len(texts))), len(texts) - 1) if share else 0
    held = set(texts[:count])
    return {prompt for prompt in prompts if plain(prompt) in held}


@lru_cache(maxsize=2**17)  # while a command starts, the same list is split several times
def plain(prompt: str) -> str:
    """Normalise a prompt, so that two spellings of it compare equal.

    Case, repeated spaces, Unicode form, invisible characters and a full stop at the end make no difference.
    """
    text = unicodedata.normalize("NFKC", prompt).casefold()
    visible = [sign for sign in text if unicodedata.category(sign) != "Cf"]
    spaced = "".join(" " if sign.isspace() else sign for sign in visible)
    return " ".join(spaced.split()).rstrip(" .。")
