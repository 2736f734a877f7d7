"""The numbers of a step: one for each metric, over the parts of its batch and all processes; and its peak memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence

import torch

from prfl.objective.base import Mean
from prfl.utils import processes

GIB = 2**30


def average_metrics(records: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """Average what the parts of a batch measured, over the parts and over all processes.

    records, sizes: what each part of this process's batch measured, and on how many samples.
    A metric is its mean over the samples that have it, as if they had been one batch; so is NAME_std, the deviation
    around NAME.  NAME/max is the largest.  seconds/ add up over the parts and are averaged over processes.
    """
    local = [({**record, **_squares(record)}, size) for record, size in zip(records, sizes, strict=True)]
    everywhere = [part for parts in processes.gather(local) for part in parts]

    # Weighted sums, and the largest of what is a maximum.
    totals: dict[str, tuple[float, int]] = {}
    largest: dict[str, float] = {}
    for record, size in everywhere:
        for name, value in record.items():
            if name.endswith("/max"):
                before = largest.get(name, value)
                largest[name] = value if math.isnan(value) else max(before, value)
                continue
            weight = value.count if isinstance(value, Mean) else 1 if name.startswith("seconds/") else size
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + weight * value, count + weight
    means = {name: total / count for name, (total, count) in totals.items()}

    # Deviations from their means of squares; seconds from their means over the parts.
    for name in [name for name in means if name.endswith("_std")]:
        means[name] = max(0.0, means[name] - means[name.removesuffix("_std")] ** 2) ** 0.5
    for name in means:
        if name.startswith("seconds/"):
            means[name] *= len(records)
    return means | largest


def _squares(record: Mapping[str, float]) -> dict[str, float]:
    """Return the deviations as means of squares, which can be averaged."""
    return {
        name: value**2 + record[name.removesuffix("_std")] ** 2
        for name, value in record.items()
        if name.endswith("_std")
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the peak memory in GiB; None on Windows, whose CPU processes do not say.

    GPU: allocated at most since ``reset_peak``.  CPU: the process's largest resident size so far.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
