"""The processes of one run, as ``torchrun`` or ``accelerate launch`` start them.  Everything here works alone as well.

accelerate makes the process group (training/log.py).  This is for those below the trainer, who only share out work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from prfl.errors import PrflError

Item = TypeVar("Item")


def rank() -> int:
    """This process's number; the main one is 0."""
    return dist.get_rank() if _grouped() else 0


def count() -> int:
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """The one that writes files and speaks to the console."""
    return rank() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part: contiguous and in order, so that the parts of all of them, joined, are the whole."""
    return items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()]


def gather(value: Item) -> list[Item]:
    """Every process's value, by rank, on every process."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, value)
    return found


def wait() -> None:
    """Until every process has come here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the block alone; the others follow and find what it has made."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def peers() -> Iterator[None]:
    """Turns the loss of another process (it died, failed, or did not answer in time) into a PrflError."""
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        first = str(error).splitlines()[0]
        reason = (first.partition("] ")[2] or first).partition(". ")[0]  # without the line of its source, and advice
        raise PrflError(
            f"process {rank()} of {count()} lost another one: {reason}",
            where="training on several processes",
            fix="read what the other one wrote last (nothing: the system may have killed it for want of memory), then "
            "start all of them again; the run goes on from its last checkpoint",
        ) from error


def end() -> None:
    """Leave the process group, after the last stage."""
    if _grouped():
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
