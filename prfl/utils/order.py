"""The order of a list's items: from a global sample index to an item."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from prfl.utils import rng

PROMPTS = "prompts"  # the ``purpose`` for which the order of the training prompts is drawn


def shuffled(indices: Sequence[int], length: int, seed: int, purpose: str) -> list[int]:
    """Map global sample indices to positions in a list of ``length``.  Each epoch visits every item, in a new order."""
    return [epoch_order(length, seed, purpose, index // length)[index % length] for index in indices]


def shuffled_alike(indices: Sequence[int], kinds: Sequence[int], batch: int, seed: int, purpose: str) -> list[int]:
    """Map global sample indices as ``shuffled`` does, but so that all items of a batch have the same kind.

    kinds: the kind of each item.  batch: samples per step.  Each epoch visits every item; some items of a kind come
    again, to fill the last batch of that kind.
    """
    chosen = []
    of_items = tuple(kinds)
    count = sum(-(-of_items.count(kind) // batch) for kind in set(of_items))
    for index in indices:
        number, offset = divmod(index, batch)
        batches = epoch_batches(of_items, batch, seed, purpose, number // count)
        chosen.append(batches[number % count][offset])
    return chosen


def met(samples: int, length: int, seed: int, purpose: str) -> list[int]:
    """List the positions that a training of ``samples`` samples visits, once each, in the list's order."""
    return sorted(shuffled(range(min(samples, length)), length, seed, purpose))


@lru_cache(maxsize=8)  # a batch asks for the same epoch again and again
def epoch_order(length: int, seed: int, purpose: str, epoch: int) -> list[int]:
    """Draw the order of one epoch."""
    return rng.permutation(length, seed, f"order/{purpose}", epoch)


@lru_cache(maxsize=8)
def epoch_batches(kinds: tuple[int, ...], batch: int, seed: int, purpose: str, epoch: int) -> list[list[int]]:
    """Draw the batches of one epoch, each of one kind, in a new order."""
    batches = []
    for kind in sorted(set(kinds)):
        order = [item for item in epoch_order(len(kinds), seed, purpose, epoch) if kinds[item] == kind]
        filled = [order[offset % len(order)] for offset in range(-(-len(order) // batch) * batch)]
        batches += [filled[start : start + batch] for start in range(0, len(filled), batch)]
    return [batches[number] for number in epoch_order(len(batches), seed, f"{purpose}/batches", epoch)]
