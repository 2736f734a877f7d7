"""The pieces of a step, each by itself: pytest bench/bench_pieces.py --benchmark

One piece: -k score, -k decode, -k gradient_call, -k steer.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import piece_cases
from bench.harness.session import Measured


@pytest.mark.cases(of=piece_cases.cases)
def test_pieces(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
