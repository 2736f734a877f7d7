"""Which two videos people are asked to compare, in which order, and which of the pairs are held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from prfl.data.manifest import LabelledVideo, PreferencePair
from prfl.data.prompts import hold_out

HELD_OUT = 0.2  # of the prompts, where a manifest has no splits


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt, by their names below the page's folder; a is shown on the left."""

    prompt: str
    a: str
    b: str
    split: str | None = None

    @property
    def row(self) -> dict[str, str]:
        """The row of a manifest of pairs that lacks only the preference."""
        split = {} if self.split is None else {"split": self.split}
        return {"prompt": self.prompt, "a": self.a, "b": self.b, **split}

    @property
    def held_out(self) -> bool:
        return self.split not in (None, "train")

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(" ".join(sorted((self.a, self.b))).encode()).digest()


def all_pairs(folder: Path, rows: Sequence[LabelledVideo] | Sequence[PreferencePair]) -> list[Pair]:
    """Pair every two videos of a prompt and split; a manifest of pairs has its own.

    Which of the two is on the left, and the order of a prompt's pairs, are a hash of the names: no side and no sample
    comes first more often, and the same videos always give the same pairs.
    """
    by_prompt: dict[str, list[Pair]] = {}
    members: dict[tuple[str, str | None], list[LabelledVideo]] = {}
    for row in rows:
        if isinstance(row, PreferencePair):
            by_prompt.setdefault(row.prompt, []).append(
                Pair(row.prompt, video_name(folder, row.a), video_name(folder, row.b), row.split)
            )
        else:
            members.setdefault((row.prompt, row.split), []).append(row)
    for (prompt, _), videos in members.items():
        for first, second in combinations(videos, 2):
            a, b = sorted((video_name(folder, first.video), video_name(folder, second.video)))
            pair = Pair(prompt, a, b, first.split)
            turned = bool(pair.digest[0] & 1)
            by_prompt.setdefault(prompt, []).append(replace(pair, a=pair.b, b=pair.a) if turned else pair)
    return [pair for pairs in by_prompt.values() for pair in sorted(pairs, key=lambda pair: pair.digest)]


def with_splits(pairs: Sequence[Pair]) -> list[Pair]:
    """Hold out a fifth of the prompts without a split: at least one of two or more (``hold_out``).

    Not where rows have the splits train or validation: then those without one are trained on, as everywhere.
    """
    if any(pair.split in ("train", "validation") for pair in pairs):
        return list(pairs)
    held = hold_out([pair.prompt for pair in pairs if pair.split is None], HELD_OUT)
    names = {pair: pair.split or ("validation" if pair.prompt in held else "train") for pair in pairs}
    return [replace(pair, split=names[pair]) for pair in pairs]


def spread(pairs: Sequence[Pair], uncertainty: Mapping[str, float] | None = None) -> list[Pair]:
    """Order pairs so that whoever stops early has covered the prompts, and has held some out.

    The splits come evenly mixed, the held-out ones first.  In each, the first pair of every prompt comes before the
    second of any.  uncertainty: how unsure a head is of each pair, by its row's names "a b"; those of the training
    split then come with the least sure first.  The held-out ones do not: an accuracy on hard pairs says little.
    """
    of_split: dict[str | None, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.held_out):
        of_split.setdefault(pair.split, []).append(pair)
    placed: list[tuple[float, Pair]] = []
    for members in of_split.values():
        held_out = members[0].held_out
        ordered = _in_rounds(members)
        if uncertainty is not None and not held_out:
            ordered = sorted(members, key=lambda pair: -uncertainty[f"{pair.a} {pair.b}"])
        first = 0.1 if held_out else 0.5
        placed += [((number + first) / len(ordered), pair) for number, pair in enumerate(ordered)]
    return [pair for _, pair in sorted(placed, key=lambda place_and_pair: place_and_pair[0])]


def _in_rounds(pairs: Sequence[Pair]) -> list[Pair]:
    """The first pair of every prompt, then the second of every, and so on."""
    rounds: dict[str, int] = {}
    numbered = []
    for pair in pairs:
        rounds[pair.prompt] = rounds.get(pair.prompt, -1) + 1
        numbered.append((rounds[pair.prompt], pair))
    return [pair for _, pair in sorted(numbered, key=lambda round_and_pair: round_and_pair[0])]


def video_name(folder: Path, video: Path) -> str:
    """Name a video as the rows of a manifest in ``folder`` do; links stay as they are."""
    return Path(os.path.relpath(video, folder)).as_posix()
