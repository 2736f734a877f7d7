"""Schedules, clipping, the average of the weights, and the metrics file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prfl.training.ema import Ema
from prfl.training.logger import average
from prfl.training.optimizer import clip_gradients, learning_rate
from prfl.training.run_folder import drop_metrics_after, read_metrics


def rates(schedule):
    return [learning_rate(s, peak=2.0, warmup=2, schedule=schedule, steps=6) for s in range(7)]


def test_schedules():
    assert rates("constant") == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert rates("linear") == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert rates("cosine") == pytest.approx([1.0, 2.0, 2.0, 1 + 2**-0.5, 1.0, 1 - 2**-0.5, 0.0])


def test_clipping_gives_the_norm_before():
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None) == pytest.approx(5.0) and parameters[0].grad == 3.0
    assert clip_gradients(parameters, 1.0) == pytest.approx(5.0)
    assert float(parameters[1].grad) == pytest.approx(0.8, abs=1e-5)


def test_the_average_follows_frozen_flags_too():
    """Outside the backbone's adapter context nothing requires a gradient; the average must not become a copy there."""
    weight = nn.Parameter(torch.zeros(1)).requires_grad_(False)
    ema = Ema({"w": weight}, decay=0.5)
    weight.fill_(1.0)
    ema.update()
    assert float(ema.average["w"]) == pytest.approx(1 - 2 / 11)
    for _ in range(100):
        ema.update()
    before = ema.average["w"].clone()
    weight.fill_(3.0)
    ema.update()
    torch.testing.assert_close(ema.average["w"], (before + 3) / 2)
    with pytest.raises(RuntimeError), ema.applied():
        assert torch.equal(weight, ema.average["w"])
        raise RuntimeError
    assert float(weight) == 3.0


def test_metrics_after_the_checkpoint_and_half_a_line_go(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "seconds/step": 2.0}', '{"step": 1, "held_out": 0.5}', '{"step": 2, "seconds/step": 1.0}']
    path.write_text("\n".join([*lines, '{"step": 3, "lo']))
    assert [r["step"] for r in read_metrics(path)] == [1, 1, 2]
    drop_metrics_after(path, 1)
    assert read_metrics(path) == [{"step": 1, "seconds/step": 2.0}]


def test_means_are_over_the_records_that_have_the_number():
    assert average([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
