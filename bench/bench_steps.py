"""A training step, latent against pixel, methods, plain rival: pytest bench/bench_steps.py --benchmark

One comparison: -k same_step, -k methods or -k rival.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import step_cases
from bench.harness.session import Measured


@pytest.mark.cases(of=step_cases.cases)
def test_steps(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
