"""The order of a list's items: from a global sample index to an item."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from prfl.utils import rng

PROMPTS = "prompts"  # the purpose of the order in which training prompts are taken


def shuffled(indices: Sequence[int], length: int, seed: int, purpose: str) -> list[int]:
    """Map global sample indices to positions in a list of ``length``: every item once an epoch, in a new order each."""
    return [epoch_order(length, seed, purpose, index // length)[index % length] for index in indices]


def met(samples: int, length: int, seed: int, purpose: str) -> list[int]:
    """List the positions that a training of so many samples comes to, once each, in the list's order."""
    return sorted(shuffled(range(min(samples, length)), length, seed, purpose))


@lru_cache(maxsize=8)  # a batch asks for the same epoch again and again
def epoch_order(length: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """Draw the order of one epoch."""
    return rng.permutation(length, seed, f"order/{purpose}", epoch)
