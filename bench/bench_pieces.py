"""The pieces of a step, each by itself: pytest bench/bench_pieces.py --benchmark

One piece: -k score, -k decode, -k gradient_call.
"""

from __future__ import annotations

from typing import Any

import pytest

from prfl.benchmark import piece_cases
from prfl.benchmark.session import Measured


@pytest.mark.cases(of=piece_cases.cases)
def test_pieces(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
