"""Results as pytest-benchmark's files keep them: what goes into ``extra_info``, and rows read back from the files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import bundle
from bench.harness.facts import device_name, facts, roofline
from bench.harness.measure import Measurement, quantiles
from bench.harness.problem import Case, Problem
from prfl.evaluation.metrics import Interval, bootstrap
from prfl.utils.errors import PrflError


@dataclass(frozen=True)
class Row:
    """One provider of one case.  ``info`` is the extra_info of its benchmark."""

    name: str  # of the benchmark, as pytest-benchmark has it in full
    info: Mapping[str, Any]
    file: Path

    @property
    def case(self) -> str:
        return self.info["case"]

    @property
    def provider(self) -> str:
        return self.info["provider"]

    @property
    def rounds(self) -> list[float]:
        """Return the seconds of each round."""
        return [each / 1000 for each in self.info["rounds_ms"]]


def figures(
    case: Case, provider: str, problem: Problem, measured: Measurement, reference: Measurement
) -> dict[str, Any]:
    """Make the extra_info of a benchmark: plain values, with what a reader needs to weigh them."""
    median, low, high = quantiles(measured.seconds)
    device = device_name()
    return {
        "case": case.name,
        "operation": case.operation,
        "settings": dict(case.settings),
        "provider": problem.names.get(provider, provider),
        "reference": problem.names.get(problem.reference, problem.reference),
        "milliseconds": {"median": median * 1e3, "low": low * 1e3, "high": high * 1e3},
        "times_reference": vars(time_ratio(reference.seconds, measured.seconds)),
        "rounds_ms": [float(f"{each * 1e3:.6g}") for each in measured.seconds],
        "parts_ms": {part: seconds * 1e3 for part, seconds in measured.parts.items()},
        "facts": measured.facts,
        "lacks": measured.lacks,
        "tflops": problem.flops / median / 1e12 if problem.flops else None,
        "gb_per_s": problem.moved / median / 1e9 if problem.moved else None,
        "roofline": roofline(median, problem.flops, problem.moved, problem.dtype, device) if device else None,
        "memory": measured.memory,
        "saved_bytes": measured.saved_bytes,
        "error": max(measured.errors.values(), default=None),
        "errors": measured.errors,
        "error_against": measured.against,
        "device": device or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(problem.dtype).removeprefix("torch."),
        "shapes": {name: list(shape) for name, shape in problem.shapes.items()},
        **facts(problem.weights),
    }


def read(files: Iterable[Path]) -> list[Row]:
    """Read the rows of files of pytest-benchmark and of bundles (.jsonl), in their order.

    Of one benchmark in several files the last one counts.  Raises PrflError for a file that is not there or none of
    these.
    """
    rows: dict[tuple[str, str], Row] = {}
    for file in files:
        if file.suffix == ".jsonl":
            measured = [Row(name, info, file) for name, info in bundle.case_rows(bundle.read_lines(file))]
            rows.update({(row.info["device"], row.name): row for row in measured})
            continue
        try:
            benchmarks = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            fix = "give a file that pytest --benchmark --benchmark-json=FILE wrote"
            raise PrflError(f"no results of pytest-benchmark: {error}", where=str(file), fix=fix) from error
        for benchmark in benchmarks:
            info = benchmark["extra_info"]
            if "case" in info:
                rows[info["device"], benchmark["fullname"]] = Row(benchmark["fullname"], info, file)
    return list(rows.values())


def by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


# ----------------------------------------------------------------------------------------------- ratios, with intervals


def time_ratio(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    """Divide the median of slow by that of fast: how many times as fast; the interval is over rounds.

    Rounds of one run are drawn as pairs, for a round's providers were timed side by side; unequally many (two runs)
    are drawn apart.
    """
    numerator, denominator = (torch.tensor(each, dtype=torch.float64) for each in (slow, fast))
    if len(slow) == len(fast):
        return bootstrap(lambda times: medians(times, numerator) / medians(times, denominator), len(slow))
    return time_ratio_apart(slow, fast)


def time_ratio_apart(slow: Sequence[float], fast: Sequence[float]) -> Interval:
    """Compute ``time_ratio`` of two runs, whose rounds have nothing to do with each other."""
    numerator, denominator = (torch.tensor(each, dtype=torch.float64) for each in (slow, fast))
    both, split = len(slow) + len(fast), len(slow)

    def ratio(times: Tensor) -> Tensor:
        return medians(times[:, :split], numerator) / medians(times[:, split:], denominator)

    return bootstrap(ratio, both)


def medians(times: Tensor, values: Tensor) -> Tensor:
    """Compute medians of values drawn so many times each.  times: (resamples, values).  NaN where none was drawn."""
    ordered, order = values.sort()
    passed = times[:, order].cumsum(1)
    half = passed[:, -1:] / 2
    lower, upper = ((passed < half - 0.25).sum(1), (passed < half + 0.25).sum(1))
    last = len(values) - 1
    middle = (ordered[lower.clamp(max=last)] + ordered[upper.clamp(max=last)]) / 2
    return torch.where(passed[:, -1] > 0, middle, torch.nan)
