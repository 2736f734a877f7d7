"""Results of pytest-benchmark with made-up figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.measure import Measurement
from bench.harness.problem import Case, Problem, Work
from bench.harness.results import figures


def adding(width: int) -> Problem:
    x = torch.linspace(0, 1, width, requires_grad=True)
    works = {
        "plain": lambda: Work(lambda _: {"y": x * 2 + 1}),
        "other": lambda: Work(lambda _: {"y": 1 + x + x}),
        "wrong": lambda: Work(lambda _: {"y": x * 2.01 + 1}),
        "ceiling": lambda: Work(lambda _: None),
    }

    def exact() -> dict[str, torch.Tensor]:
        return {"y": x.detach().double() * 2 + 1}

    return Problem(works, "plain", torch.float32, exact, moved=8.0 * width, shapes={"x": (width,)})


CASE = Case("adding", adding, {"width": 64}, ("plain", "other", "ceiling"))


@pytest.fixture
def results(tmp_path: Path) -> Callable[..., Path]:
    """results("a.json", plain=[...], other=[...]): a file with these seconds; saved={"other": 5} and peak likewise.

    more: of a provider, other fields of what was found."""

    def write(name: str, saved: Any = None, peak: Any = None, more: Any = None, **seconds: list[float]) -> Path:
        found = {
            provider: Measurement(
                some, (saved or {}).get(provider, 1024), {"y": 1e-7}, "float64",
                {"peak": (peak or {}).get(provider, 2**20)}, **(more or {}).get(provider, {}),
            )
            for provider, some in seconds.items()
        }  # fmt: skip
        benchmarks = [
            {
                "fullname": f"bench/bench_x.py::test_x[{CASE.name}-{provider}]",
                "extra_info": figures(CASE, provider, adding(64), own, found["plain"]),
            }
            for provider, own in found.items()
        ]
        path = tmp_path / name
        path.write_text(json.dumps({"benchmarks": benchmarks}))
        return path

    return write
