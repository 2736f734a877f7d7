"""What a step costs against its size: pytest bench/bench_scale.py --benchmark

One axis: -k frames, resolution, steps, gradients or batch; one method: -k prfl.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import scale_cases
from bench.harness.session import Measured


@pytest.mark.cases(of=scale_cases.cases)
def test_scale(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
