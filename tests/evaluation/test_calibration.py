"""How often the calibration error's interval covers the true error: simulated scores whose error is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prfl.evaluation import metrics

SIMULATIONS, PROMPTS, EACH = 150, 64, 6


def simulated(error: float, draw: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Probabilities that all claim too little by ``error``, what came of them, and the true error.

    A fifth of an outcome's variance is its prompt's, so that samples of a prompt are alike.
    """
    claimed = (1.2 * torch.randn(PROMPTS * EACH, generator=draw)).sigmoid()
    true = (claimed + error).clamp(max=1)
    luck = torch.randn(PROMPTS, generator=draw).repeat_interleave(EACH) * 0.2**0.5
    luck = torch.special.ndtr(luck + 0.8**0.5 * torch.randn(PROMPTS * EACH, generator=draw))
    return claimed, (luck < true).float(), float((true - claimed).mean())


@pytest.mark.parametrize("error", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_the_interval_covers_the_true_error(error: float) -> None:
    draw = torch.Generator().manual_seed(0)
    prompts = [str(number) for number in range(PROMPTS) for _ in range(EACH)]
    covered = inside = 0
    values = []
    for _ in range(SIMULATIONS):
        claimed, good, true = simulated(error, draw)
        interval, _ = metrics.calibration_error(claimed, good, prompts, resamples=150)
        covered += interval.low <= true <= interval.high
        inside += interval.low <= interval.value <= interval.high
        values.append(interval.value)
    assert covered >= 0.9 * SIMULATIONS  # the plain percentiles: 0, 0, 71, 137 and 141 of 150
    assert inside == SIMULATIONS
    assert abs(sum(values) / SIMULATIONS - error) < 0.025
