"""Whether a trained reward ranks better than chance, by what its card says of held-out labels."""

from __future__ import annotations

import math
from collections.abc import Iterable

from prfl.reward.stored import RewardCard

CHANCE = 0.5
CLEAN = 0.5  # up to this sigma a head that has learned anything ranks clearly better than chance
LOST = 0.9  # above it there is little to see, and chance is no fault of the head
SHOWN = 3


def doubts(card: RewardCard, dimensions: Iterable[str]) -> list[str]:
    """A line for the dimensions that were not measured, and one for each that ranks at or below chance, with levels."""
    measured = [name for name in dimensions if card.accuracy.get(name)]
    unknown = [name for name in dimensions if name not in measured]
    lines = []
    if unknown:
        lines.append(f"nobody knows whether it beats chance: never measured on held-out labels: {', '.join(unknown)}")
    for name in measured:
        levels, accuracy = levels_at_chance(card, name), card.accuracy[name]
        if levels:
            shown = ", ".join(f"{accuracy[level]:.2f} at sigma {level}" for level in levels[:SHOWN])
            more = f" and {len(levels) - SHOWN} levels more" if len(levels) > SHOWN else ""
            pairs = f" ({card.pairs[name]} pairs)" if name in card.pairs else ""
            lines.append(f"{name} does not rank clearly better than chance, 0.5: {shown}{more}{pairs}")
    return lines


def levels_at_chance(card: RewardCard, dimension: str) -> list[str]:
    """Bins up to ``CLEAN`` where it is not clearly above chance, and up to ``LOST`` where it is not at all."""
    found = []
    for level, accuracy in card.accuracy.get(dimension, {}).items():
        top = highest_sigma(level)
        low = card.accuracy_low.get(dimension, {}).get(level, accuracy)
        clear = min(low, accuracy - luck(card.pairs.get(dimension))) > CHANCE
        if (top <= CLEAN and not clear) or (top <= LOST and accuracy <= CHANCE):
            found.append(level)
    return found


def luck(pairs: int | None) -> float:
    """How far above one half so many coins come in one of twenty trials: an interval over few prompts is too narrow."""
    return 1.645 * 0.5 / math.sqrt(pairs) if pairs else 0.0


def highest_sigma(level: str) -> float:
    """Of a bin as it is written in a card: ``0.2-0.4``."""
    try:
        return float(level.rpartition("-")[2])
    except ValueError:
        return 0.0
