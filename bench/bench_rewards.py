"""Rewards that others trained, in their published sizes, weights random: pytest bench/bench_rewards.py --benchmark"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import reward_cases
from bench.harness.session import Measured


@pytest.mark.cases(of=reward_cases.cases)
def test_rewards(measured: Measured, benchmark: Any) -> None:
    measured.into(benchmark)
