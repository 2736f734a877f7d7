"""The trainer over a toy objective: exact resume, stopping, accumulation, guards, alternation."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prfl.config.sections.training import TrainingConfig
from prfl.training.distributed import make_accelerator
from prfl.training.logger import Logger
from prfl.training.loop import Callbacks, Hook, Resumption, fit, split_indices
from prfl.training.regulariser import Regulariser
from prfl.training.run_folder import RunFolder, read_metrics
from prfl.utils import rng
from prfl.utils.console import PlainConsole
from prfl.utils.errors import PrflError


class Line:
    """Fit y = 3 x - 1 with a dropout on x, so that the global generator matters too."""

    def __init__(self, seed: int = 0, dropout: float = 0.0, slope: float = 3.0) -> None:
        self.seed, self.dropout, self.slope = seed, dropout, slope
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls: list[tuple[int, list[int]]] = []
        self.poison: tuple[int, float] | None = None

    def parameters(self):
        return {"weight": self.weight}

    def accumulate(self, step, indices):
        self.calls.append((step, list(indices)))
        x = rng.normal((1,), self.seed, "x", step, indices)[:, 0]
        seen = torch.nn.functional.dropout(x, self.dropout)
        loss = (self.weight[0] * seen + self.weight[1] - (self.slope * x - 1)).square().mean()
        if self.poison and step == self.poison[0]:
            loss = loss * self.poison[1]
        loss.backward()
        return {"loss": float(loss.detach()), "seconds/reward": 0.5}

    def describe(self, step, indices):
        return {"x": rng.normal((1,), self.seed, "x", step, indices)}, {"note": "toy"}


def settings(**changes) -> TrainingConfig:
    given = dict(steps=6, batch=4, learning_rate=0.05, save_every=3, keep=2, ema_decay=0.5, trackers=[])
    return TrainingConfig(**(given | changes))


def go(tmp_path, objective, name="run", resume="auto", hooks=(), regulariser=None, identity=None, **changes):
    run = RunFolder(tmp_path / name)
    accelerator = make_accelerator(run, "cpu", trackers=changes.get("trackers", []))
    return fit(
        objective, settings(**changes), run, accelerator=accelerator, regulariser=regulariser,
        callbacks=Callbacks(hooks), resumption=Resumption(resume, identity or {}),
    )  # fmt: skip


def weights(tmp_path, name, step):
    folder = tmp_path / name / "checkpoints" / f"step-{step:06d}"
    return {f"{file}/{k}": v for file in ("weights", "optimizer", "ema")
            for k, v in load_file(folder / f"{file}.safetensors").items()}  # fmt: skip


def test_three_and_three_steps_equal_six_bit_for_bit(tmp_path):
    go(tmp_path, Line(dropout=0.5), "straight", schedule="cosine", warmup=2)
    stop = Hook(3, lambda step: os.kill(os.getpid(), signal.SIGTERM) or {})
    result = go(tmp_path, Line(dropout=0.5), "broken", hooks=[stop], schedule="cosine", warmup=2)
    assert (result.step, result.stopped) == (3, "SIGTERM")
    result = go(tmp_path, Line(dropout=0.5), "broken", schedule="cosine", warmup=2)
    assert (result.step, result.stopped) == (6, None)
    straight, broken = weights(tmp_path, "straight", 6), weights(tmp_path, "broken", 6)
    assert straight.keys() == broken.keys() and len(straight) == 5
    assert all(torch.equal(straight[key], broken[key]) for key in straight)
    assert not torch.equal(straight["weights/weight"], straight["ema/weight"])


@pytest.mark.parametrize(("schedule", "told"), [("cosine", True), ("constant", False)])
def test_a_run_that_is_lengthened_says_that_its_rate_falls_anew(tmp_path, capsys, schedule, told):
    go(tmp_path, Line(), schedule=schedule, steps=3)
    capsys.readouterr()
    go(tmp_path, Line(), schedule=schedule, steps=6)
    assert ("training.steps was 3 and is 6: from step 3 on" in capsys.readouterr().out) == told


@pytest.mark.parametrize("left_out", ["optimizer", "dropout seed"])
def test_the_comparison_can_fail(tmp_path, left_out, monkeypatch):
    """What the bit-for-bit test would miss if it could not fail: lost moments, a generator that is not reseeded."""
    if left_out == "optimizer":
        monkeypatch.setattr("prfl.training.checkpoint.load_optimizer", lambda *_: None)
    else:
        monkeypatch.setattr("prfl.training.loop.seed_generators", lambda *_: None)
    go(tmp_path, Line(dropout=0.5), "straight")
    go(tmp_path, Line(dropout=0.5), "broken", steps=3)
    go(tmp_path, Line(dropout=0.5), "broken")
    assert not torch.equal(weights(tmp_path, "straight", 6)["weights/weight"],
                           weights(tmp_path, "broken", 6)["weights/weight"])  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step_saves_that_step(tmp_path, number):
    class Stopped(Line):
        def accumulate(self, step, indices):
            if step == 1:
                os.kill(os.getpid(), number)
            return super().accumulate(step, indices)

    before = signal.getsignal(number)
    result = go(tmp_path, Stopped())
    assert result.step == 2 and result.stopped == number.name
    assert result.checkpoint.name == "step-000002" and (result.checkpoint / "state.json").exists()
    assert signal.getsignal(number) is before


def test_an_interrupt_that_gets_through_leaves_the_last_checkpoint_usable(tmp_path):
    def interrupt(step):
        if step == 4:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Line(), "broken", hooks=[Hook(1, interrupt)], ema_decay=0.5)
    assert [r["step"] for r in read_metrics(tmp_path / "broken" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4]
    go(tmp_path, Line(), "broken")
    go(tmp_path, Line(), "straight")
    assert torch.equal(weights(tmp_path, "broken", 6)["weights/weight"],
                       weights(tmp_path, "straight", 6)["weights/weight"])  # fmt: skip
    assert [r["step"] for r in read_metrics(tmp_path / "broken" / "metrics.jsonl") if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_accumulation_equals_one_larger_batch(tmp_path):
    whole, parts = Line(), Line()
    go(tmp_path, whole, "whole", batch=8)
    go(tmp_path, parts, "parts", batch=8, accumulation=4)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-5, atol=1e-6)
    assert whole.calls[1] == (1, list(range(8, 16)))
    assert parts.calls[4:6] == [(1, [8, 9]), (1, [10, 11])]
    one, four = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert one[2]["loss"] == pytest.approx(four[2]["loss"], rel=1e-5)
    assert one[2]["gradient_norm"] == pytest.approx(four[2]["gradient_norm"], rel=1e-4)
    assert (one[2]["seconds/reward"], four[2]["seconds/reward"]) == (0.5, 2.0)


def test_processes_share_every_part_without_overlap():
    shares = [split_indices(2, 8, 2, rank, 3) for rank in range(3)]
    assert [len(part) for share in shares for part in share] == [1, 1, 1, 1, 2, 2]
    assert sorted(i for share in shares for part in share for i in part) == list(range(16, 24))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, value):
    objective = Line()
    objective.poison = (4, value)
    before = {}
    watch = Hook(1, lambda step: before.update(weight=objective.weight.detach().clone()) or {})
    with pytest.raises(PrflError, match=r"loss is (nan|inf) in step 4") as error:
        go(tmp_path, objective, hooks=[watch], ema_decay=None)
    assert torch.equal(objective.weight, before["weight"])
    folder = tmp_path / "run" / "failed" / "step-000004"
    assert str(folder) in str(error.value)
    assert json.loads((folder / "batch.json").read_text())["indices"] == [16, 17, 18, 19]
    dumped = load_file(folder / "batch.safetensors")
    assert torch.equal(dumped["batch/x"], rng.normal((1,), 0, "x", 4, range(16, 20)))
    assert torch.equal(dumped["parameter/weight"], objective.weight)
    assert not dumped["gradient/weight"].isfinite().all()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Wild(Line):
        def accumulate(self, step, indices):
            metrics = super().accumulate(step, indices)
            self.weight.grad[1] = math.nan
            return metrics

    with pytest.raises(PrflError, match="gradient_norm is nan in step 0"):
        go(tmp_path, Wild())


def test_no_gradient_and_nothing_trainable_are_refused(tmp_path):
    class Dead(Line):
        def accumulate(self, step, indices):
            (self.weight * 0).sum().backward()
            return {"loss": 0.0}

    class Beyond(Dead):
        def accumulate(self, step, indices):
            return super().accumulate(step, indices) | {"reward": 11.26}

    class Empty(Line):
        def parameters(self):
            return {}

    with pytest.raises(PrflError, match="no gradient reached any of the 1 trained parameters"):
        go(tmp_path, Dead(), "dead")
    with pytest.raises(PrflError, match="every sample of the first step scores at least reward.target, 11.3 in"):
        go(tmp_path, Beyond(), "beyond")
    with pytest.raises(PrflError, match="nothing is trainable"):
        go(tmp_path, Empty(), "empty")


def test_the_regulariser_takes_its_own_step_before_the_reward_step(tmp_path):
    objective, other = Line(), Line(seed=1, slope=0.0)
    other.weight = objective.weight
    order = []
    for who, name in ((objective, "reward"), (other, "regulariser")):
        accumulate = who.accumulate
        who.accumulate = lambda s, i, name=name, call=accumulate: order.append((name, s)) or call(s, i)
    go(tmp_path, objective, regulariser=Regulariser(other, every=2), steps=3, betas=(0.0, 0.0), ema_decay=None)
    assert order == [("regulariser", 0), ("reward", 0), ("reward", 1), ("regulariser", 2), ("reward", 2)]
    first, second, _ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "regulariser/loss" in first and "regulariser/loss" not in second
    moments = weights_of_optimizer(tmp_path)
    assert float(moments["weight/step"]) == 5  # optimizer steps: three of the reward's, two of the regulariser's


def weights_of_optimizer(tmp_path):
    return load_file(tmp_path / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors")


def test_a_regulariser_of_other_parameters_is_refused(tmp_path):
    with pytest.raises(PrflError, match="the regulariser trains parameters that the objective does not: weight"):
        go(tmp_path, Line(), regulariser=Regulariser(Line(seed=1)))


def test_hooks_see_the_average_and_give_the_parameters_back(tmp_path):
    objective, seen = Line(), []
    hook = Hook(
        2, lambda step: seen.append((step, objective.weight.detach().clone())) or {"held_out": 1.0}, at_start=True
    )
    go(tmp_path, objective, hooks=[hook], steps=3)
    assert [step for step, _ in seen] == [0, 2, 3]
    saved = weights(tmp_path, "run", 3)
    assert torch.equal(seen[-1][1], saved["ema/weight"]) and torch.equal(objective.weight, saved["weights/weight"])
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "validation/held_out" in r] == [0, 2, 3]
    assert [r["step"] for r in records if r["phase"] == "training"] == [1, 2, 3]


def test_metrics_and_tensorboard_are_written(tmp_path, capsys):
    go(tmp_path, Line(), trackers=["tensorboard"], log_every=2)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "gradient_norm", "learning_rate", "seconds/step", "seconds/optimizer"} <= records[0].keys()
    assert list((tmp_path / "run" / "trackers").glob("events*"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"] and "loss" in lines[0]


def test_a_signal_in_an_evaluation_ends_it_and_saves_the_run_s_own_weights(tmp_path):
    """A long evaluation must not outlast the seconds that a cluster gives; the average of the weights is in then."""
    objective, ran_on = Line(), []

    def long(step):
        os.kill(os.getpid(), signal.SIGTERM)
        ran_on.append(step)
        return {"held_out": 1.0}

    result = go(tmp_path, objective, hooks=[Hook(2, long)])
    assert (result.step, result.stopped, ran_on) == (2, "SIGTERM", [])
    assert result.checkpoint.name == "step-000002"
    go(tmp_path, Line(), "straight")
    go(tmp_path, Line())
    for key, value in weights(tmp_path, "straight", 6).items():
        assert torch.equal(value, weights(tmp_path, "run", 6)[key]), key


def test_generators_of_every_kind_go_on_as_in_the_straight_run(tmp_path):
    """Python's, numpy's and torch's, whatever was drawn before: there is no state of theirs to lose."""

    class Drawing(Line):
        def accumulate(self, step, indices):
            self.slope = 3 + random.random() + float(np.random.rand()) + float(torch.rand(()))
            return super().accumulate(step, indices)

    go(tmp_path, Drawing(), "straight")
    go(tmp_path, Drawing(), "broken", steps=3)
    random.random(), np.random.rand(7), torch.rand(5)
    go(tmp_path, Drawing(), "broken")
    straight, broken = weights(tmp_path, "straight", 6), weights(tmp_path, "broken", 6)
    assert all(torch.equal(straight[key], broken[key]) for key in straight)


def test_what_is_refused_leaves_the_run_folder_as_it_was(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(PrflError, match="there is no checkpoint"):
        go(tmp_path, Line(), resume=str(tmp_path / "nowhere"))
    assert not run.exists()
    go(tmp_path, Line(), identity={"seed": 0}, steps=3)
    (run / "config.yaml").write_text("seed: 0\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(PrflError, match="seed: 0 -> 1"):
        run_folder = RunFolder(run, "seed: 1\n")
        accelerator = make_accelerator(run_folder, "cpu", [])
        fit(Line(), settings(), run_folder, accelerator=accelerator, resumption=Resumption(identity={"seed": 1}))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


NUMBERS = {
    "reward": 0.53125, "loss": -0.53125, "distance": 0.01234, "gradient_norm": 0.4567, "learning_rate": 1e-5,
    "sampled_step": 7.0, "seconds/step": 61.0, "seconds/rollout": 40.0, "seconds/adjoint": 20.0,
}  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_terminal_keeps_its_bar_beside_the_numbers(tmp_path, width):
    """Bar, steps and time left at every width; numbers are whole or left out; a line of history every two steps."""
    run = RunFolder(tmp_path / "run")
    run.begin()
    screen, now = io.StringIO(), [0.0]
    console = PlainConsole(file=screen, force_terminal=True, width=width, color_system=None, get_time=lambda: now[0])
    log = Logger(run, make_accelerator(run, "cpu", trackers=[]), every=2, steps=12000, start=11000, console=console)
    with log:
        for step in range(11001, 11008):
            now[0] += 61.0  # longer than the time over which rich measures by itself
            log.step(step, NUMBERS)
    screens = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", screen.getvalue()).replace("\r", "\n").splitlines()

    bars = [line for line in screens if "11007/12000" in line and not line.startswith("step")]
    assert bars and all(len(line) <= width for line in screens)
    assert re.match(r"[━╸╺ ]{11,} 11007/12000 16:49:33 reward 0.5312", bars[-1]), bars[-1]
    whole = {"reward 0.5312", "loss -0.5312", "distance 0.01234", "gradient_norm 0.4567", "learning_rate 1e-05"}
    shown = bars[-1].partition(" 16:49:33 ")[2].strip().split("  ")
    assert set(shown[:5]) <= whole and len(shown) > (width - 60) // 25

    history = [line for line in screens if line.startswith("step ")]
    assert [line.split()[1] for line in history] == ["11002/12000", "11004/12000", "11006/12000"]
    assert all("reward 0.5312" in line for line in history)
    assert "seconds/step 61 (rollout 40, adjoint 20)" in history[0] if width == 200 else True
    assert len(read_metrics(run.metrics)) == 7
