"""The kernels beside torch, peft, Liger and the ceiling: pytest bench/bench_kernels.py --benchmark

One operation: -k lora_linear; one mode: -k both; without the providers that compile: -k 'not compile'.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import kernel_cases
from bench.harness.session import Measured


@pytest.mark.cases(of=kernel_cases.cases)
def test_kernels(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
