"""Schedules, clipping, the average of the weights, and the metrics file."""

from __future__ import annotations

import json

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
    steps = [{"step": step, "phase": "training", "reward/shape": 0.1} for step in (1, 2)]
    round_of = {"step": 1, "phase": "validation", "validation/reward/shape": 0.5}
    path.write_text("\n".join([*map(json.dumps, (steps[0], round_of, steps[1])), '{"step": 3, "lo']))
    assert read_metrics(path) == [steps[0], round_of, steps[1]]
    drop_metrics_after(path, 1)
    assert read_metrics(path) == [steps[0]], "the round after the checkpoint is measured again"


def test_rows_of_an_older_version_get_their_phase_and_the_names_of_their_round(tmp_path):
    """Written without a phase: a step is timed, the names of a round are those of a step, a reward's had a space."""
    path = tmp_path / "metrics.jsonl"
    old = [
        {"step": 0, "reward/shape": 0.5, "distance": 0.0},
        {"step": 1, "reward/shape": 0.4, "seconds/step": 2.0},
        {"step": 1, "validation accuracy/sigma 0.5": 0.6},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    expected = [
        {"step": 0, "phase": "validation", "validation/reward/shape": 0.5, "validation/distance": 0.0},
        {"step": 1, "phase": "training", "reward/shape": 0.4, "seconds/step": 2.0},
        {"step": 1, "phase": "validation", "validation/accuracy/sigma 0.5": 0.6},
    ]
    assert read_metrics(path) == expected
    drop_metrics_after(path, 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected[:2]


def test_means_are_over_the_records_that_have_the_number():
    assert average([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
