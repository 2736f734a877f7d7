"""Tells whether a trained reward ranks better than chance, by the accuracy on held-out labels in its card."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping

import yaml

from prfl.reward.checkpoint_schema import RewardCard

CHANCE = 0.5
CLEAN = 0.5  # up to this sigma a head that has learned anything ranks clearly better than chance
LOST = 0.9  # above it there is little to see, and chance is no fault of the head
SHOWN = 3  # levels that a line names


def doubts(card: RewardCard, dimensions: Iterable[str]) -> list[str]:
    """Write a line for the dimensions that were not measured, and one for each that ranks at or below chance."""
    measured = [name for name in dimensions if card.accuracy.get(name)]
    unmeasured = [name for name in dimensions if name not in measured]

    lines = []
    if unmeasured:
        names = ", ".join(unmeasured)
        lines.append(f"nobody knows whether it beats chance: never measured on held-out labels: {names}")

    for name in measured:
        levels, accuracy = levels_at_chance(card, name), card.accuracy[name]
        if levels:
            shown = ", ".join(f"{accuracy[level]:.2f} at sigma {level}" for level in levels[:SHOWN])
            more = f" and {len(levels) - SHOWN} levels more" if len(levels) > SHOWN else ""
            pairs = f" ({card.pairs[name]} pairs)" if name in card.pairs else ""
            lines.append(f"{name} does not rank clearly better than chance, 0.5: {shown}{more}{pairs}")
    return lines


def ranks_clearly(card: RewardCard, dimensions: Iterable[str]) -> list[str]:
    """Select the dimensions that were measured and rank clearly better than chance: those worth following."""
    return [name for name in dimensions if card.accuracy.get(name) and not levels_at_chance(card, name)]


def weights_override(weights: Mapping[str, float]) -> str:
    """Write ``reward.weights`` as an argument of the command line that can be pasted."""
    text = yaml.safe_dump(dict(weights), default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return shlex.quote(f"reward.weights={text.strip()}")


def advice(card: RewardCard, weights: Mapping[str, float]) -> str:
    """Say which dimensions to follow, with what weights; none where nothing ranks clearly better than chance.

    weights: of all dimensions in question; the ones that are worth following keep theirs.
    """
    clear = ranks_clearly(card, weights)
    if not clear:
        return "none of them is worth following yet: train it on more labels, or on more of each prompt's videos"
    return f"follow {', '.join(clear)}: {weights_override({name: weights[name] for name in clear})}"


def levels_at_chance(card: RewardCard, dimension: str) -> list[str]:
    """List the sigma bins where the accuracy is too low to trust.

    Up to ``CLEAN`` it has to be clearly above chance; from there to ``LOST``, above chance at all.
    """
    margin = chance_margin(card.pairs.get(dimension))
    levels = []
    for level, accuracy in card.accuracy.get(dimension, {}).items():
        sigma = highest_sigma(level)
        low = card.accuracy_low.get(dimension, {}).get(level, accuracy)
        clear = min(low, accuracy - margin) > CHANCE
        if (sigma <= CLEAN and not clear) or (sigma <= LOST and accuracy <= CHANCE):
            levels.append(level)
    return levels


def chance_margin(pairs: int | None) -> float:
    """Return how far above one half the share of heads of ``pairs`` coins comes in one of twenty trials.

    The card's interval over prompts is too narrow where prompts are few; this bound does not depend on them.
    """
    return 1.645 * 0.5 / math.sqrt(pairs) if pairs else 0.0  # 1.645: the normal distribution's 95 % point


def highest_sigma(level: str) -> float:
    """Return the upper end of a sigma bin as a card writes it: 0.4 of ``0.2-0.4``."""
    try:
        return float(level.rpartition("-")[2])
    except ValueError:
        return 0.0
