"""Lists of prompts, and their one split into train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from prfl.data.files import json_rows, numbered_lines
from prfl.data.manifest import Text, checked
from prfl.errors import PrflError

SPLITS = ("train", "validation", "test")


class _PromptRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, str_strip_whitespace=True)
    prompt: Text


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line from a .txt file (blank lines are skipped), or ``{"prompt": ...}`` a line from a .jsonl file.

    Raises PrflError with file and line for an empty or repeated prompt, and for a file without any.
    """
    path = Path(path)
    if path.suffix == ".txt":
        found = numbered_lines(path)
    elif path.suffix == ".jsonl":
        found = [(where, checked(_PromptRow, fields, where).prompt) for where, fields in json_rows(path)]
    else:
        raise PrflError("is neither .txt nor .jsonl", where=str(path), fix="one prompt a line in a .txt file")
    if not found:
        raise PrflError("holds no prompts", where=str(path), fix="write one prompt on each line")
    first: dict[str, str] = {}
    for where, prompt in found:
        if first.setdefault(prompt, where) != where:
            fix = "remove one; a prompt counts once"
            raise PrflError(f"the prompt {prompt[:80]!r} stands already at {first[prompt]}", where=where, fix=fix)
    return list(first)


def split_prompts(
    prompts: Sequence[str], fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0
) -> dict[str, list[str]]:
    """``{"train": ..., "validation": ..., "test": ...}``, each in the order given.

    A prompt's place depends on a hash of (seed, prompt), not on its line: reordering the list changes nothing.
    Raises PrflError when the fractions do not sum to 1, a split with a fraction would be empty, or a prompt repeats.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        fix = "three numbers of at least 0 that sum to 1"
        raise PrflError(f"the fractions {list(fractions)} for {', '.join(SPLITS)} are wrong", fix=fix)
    if len(set(prompts)) < len(prompts):
        raise PrflError("a prompt stands twice, so it could be in two splits", fix="remove the repeated prompt")
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}/{prompt}".encode()).digest())
    bounds = [round(len(order) * sum(fractions[:end])) for end in range(len(SPLITS) + 1)]
    split = {}
    for name, fraction, start, end in zip(SPLITS, fractions, bounds, bounds[1:], strict=False):
        chosen = set(order[start:end])
        if fraction > 0 and not chosen:
            raise PrflError(f"{len(prompts)} prompts leave '{name}' empty", fix="more prompts, or other fractions")
        split[name] = [prompt for prompt in prompts if prompt in chosen]
    return split
