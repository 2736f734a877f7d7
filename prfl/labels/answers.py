"""What people answered, in whatever words: which of two videos is better, or a rating; and several answers together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from prfl.data.manifest import Choice
from prfl.utils.errors import PrflError

SIDES: dict[Choice, str] = {
    "a": "a, left, first, 1, video 1, video a, leftvote",
    "b": "b, right, second, 2, video 2, video b, rightvote",
    "tie": "tie, same, equal, both, draw, tievote, neither, none, bothbad, bothbad_vote, both bad, no preference",
}
"""Words for each side, as they stand in public sets and in people's tables."""
_CHOICES: dict[str, Choice] = {word: side for side, words in SIDES.items() for word in words.split(", ")}
_RATINGS = {"yes": 1.0, "no": 0.0, "true": 1.0, "false": 0.0}
SWAPPED: dict[Choice, Choice] = {"a": "b", "b": "a", "tie": "tie"}


def is_empty(value: Any) -> bool:
    """Tell whether a cell holds no answer: nothing, or the NaN that a parquet file has for it."""
    return value is None or value != value or value == ""


def choice_of(name: str, value: Any, where: str) -> Choice:
    """Return the better side that a cell names, blind to case, blanks and "... (is) better".

    name: the dimension, for the error.  Raises PrflError for another word.
    """
    word = " ".join(str(value).lower().replace("-", " ").split())
    word = re.sub(r"( is)? better$", "", word)
    for spelling in (word, word.replace(" ", ""), re.sub(r"(?<=[a-z])[ _]*(?=[12]$)", " ", word)):
        if spelling in _CHOICES:
            return _CHOICES[spelling]
    fix = f"a ({SIDES['a'].split(', ', 1)[1]}), b or tie; --ignore leaves a column out that is no answer"
    raise PrflError(f"'{name}': found {str(value)[:80]!r}, which is no side of a pair", where=where, fix=fix)


def compared(scores: tuple[float, float], margin: float) -> Choice:
    """Return the side with the higher score; a tie where they differ by no more than ``margin``."""
    difference = scores[0] - scores[1]
    if abs(difference) <= margin:
        return "tie"
    return "a" if difference > 0 else "b"


def number_of(name: str, value: Any, where: str) -> float:
    """Read a number, with a decimal point or comma, or yes or no as 1 or 0.  Raises PrflError."""
    text = str(value).strip().lower()
    try:
        return _RATINGS[text] if text in _RATINGS else float(re.sub(r"^(-?\d+),(\d+)$", r"\1.\2", text))
    except ValueError:
        fix = "a number, yes or no, or an empty cell; --ignore leaves a column out that is no rating"
        raise PrflError(f"'{name}' is {str(value)[:80]!r}, not a number", where=where, fix=fix) from None


def rating_of(name: str, value: Any, scale: tuple[float, float], where: str) -> float:
    """Read a rating as a number in [0, 1].  scale: the worst and the best; a best below the worst turns it round.

    Raises PrflError for no number, or one outside of the scale.
    """
    worst, best = scale
    number = number_of(name, value, where)
    if not min(scale) <= number <= max(scale):
        fix = f"a number from {worst:g} to {best:g}; other scales are told by --scale, as --scale 1:5"
        raise PrflError(f"'{name}' is {value}", where=where, fix=fix)
    return (number - worst) / (best - worst)


def majority(choices: Sequence[Choice]) -> Choice:
    """Return what most raters chose; a tie where no side has more than the other."""
    counts = Counter(choices)
    if counts["a"] == counts["b"] or counts["tie"] > max(counts["a"], counts["b"]):
        return "tie"
    return "a" if counts["a"] > counts["b"] else "b"


def agreement(answers: Sequence[Sequence[Choice | float]]) -> tuple[float, int]:
    """Return the share of pairs of raters who gave one video, or pair, the same answer, and how many such pairs.

    answers: of each video or pair, what its raters said.
    """
    same = [first == second for said_of_one in answers for first, second in combinations(said_of_one, 2)]
    return (sum(same) / len(same) if same else float("nan")), len(same)
