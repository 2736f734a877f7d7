"""One number for each metric of an optimizer step: over the parts of its batch and over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prfl.objective.base import Mean
from prfl.utils import processes


def average_metrics(records: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """records, sizes: what each part of this process's batch measured, and on how many samples.

    A metric is its mean over the samples that have it, as if they had been one batch; so is NAME_std, the deviation
    around NAME.  NAME/max is the largest.  seconds/ add up over the parts and are averaged over processes.
    """
    own = [({**record, **_squares(record)}, size) for record, size in zip(records, sizes, strict=True)]
    totals: dict[str, tuple[float, int]] = {}
    largest: dict[str, float] = {}
    for record, size in [part for parts in processes.gather(own) for part in parts]:
        for name, value in record.items():
            if name.endswith("/max"):
                known = largest.get(name, value)
                largest[name] = value if math.isnan(value) else max(known, value)
                continue
            weight = value.count if isinstance(value, Mean) else 1 if name.startswith("seconds/") else size
            total, count = totals.get(name, (0.0, 0))
            totals[name] = total + weight * value, count + weight
    means = {name: total / count for name, (total, count) in totals.items()}
    for name in [name for name in means if name.endswith("_std")]:
        means[name] = max(0.0, means[name] - means[name.removesuffix("_std")] ** 2) ** 0.5
    parts = len(records)
    return {n: value * (parts if n.startswith("seconds/") else 1) for n, value in means.items()} | largest


def _squares(record: Mapping[str, float]) -> dict[str, float]:
    """Deviations as means of squares, which can be averaged."""
    return {
        name: value**2 + record[name.removesuffix("_std")] ** 2
        for name, value in record.items()
        if name.endswith("_std")
    }
