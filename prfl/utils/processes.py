"""The processes of one run, as ``torchrun`` or ``accelerate launch`` start them.  All of it works in one process too.

accelerate makes the process group (training/distributed.py).  These functions are for the code below the trainer, which
only divides work among the processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from prfl.utils.errors import PrflError

Item = TypeVar("Item")


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # it sets all of them
ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")  # of accelerate; none is used here


def check_environment() -> None:
    """Raise PrflError for a launcher's environment variables that would make accelerate misbehave.

    It would use an engine or device that prfl does not expect, or wait for processes that do not exist.
    """
    unset = "unset it, or start prfl with torchrun or a plain multi-GPU `accelerate launch`"

    # What asks accelerate for an engine or a device.
    for name in (f"ACCELERATE_USE_{engine}" for engine in ENGINES):
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise PrflError(f"asks accelerate for {name[15:]}, which prfl does not use", where=name, fix=unset)
    if device := os.environ.get("ACCELERATE_TORCH_DEVICE"):
        what = f"asks accelerate for the device {device}, and a config says it by backbone.device"
        raise PrflError(what, where="ACCELERATE_TORCH_DEVICE", fix="unset it (CUDA_VISIBLE_DEVICES chooses a GPU)")

    # What torchrun sets: all of it, or nothing.
    for name in TORCHRUN[:3]:
        if name in os.environ and not os.environ[name].isdecimal():
            raise PrflError(f"is {os.environ[name]!r}, not a number", where=name, fix=unset)
    present = [name for name in TORCHRUN[:2] if name in os.environ]
    missing = [name for name in TORCHRUN if name not in os.environ]
    if present and missing:
        what = f"set, and {', '.join(missing)} not: left over from another launcher?"
        raise PrflError(what, where=", ".join(present), fix=f"unset {' '.join(present)}, or start prfl with torchrun")


def rank() -> int:
    """Return this process's number; the main one is 0."""
    return dist.get_rank() if _grouped() else 0


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _grouped() else 1


def is_main() -> bool:
    """Tell whether this process writes the files and speaks to the console."""
    return rank() == 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """Take this process's part: contiguous and in order, so that the parts of all processes, joined, are the whole."""
    return items[len(items) * rank() // count() : len(items) * (rank() + 1) // count()]


def gather(value: Item) -> list[Item]:
    """Collect every process's value, by rank, on every process."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block on the main process first; the others run it after, and find what the main process wrote."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn the loss of another process (it died, failed, or did not answer in time) into a PrflError."""
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
