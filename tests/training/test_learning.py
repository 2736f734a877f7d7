"""Looks at a run that must not change it, that find what does not learn, and leave alone what does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prfl.training.distributed import make_accelerator
from prfl.training.learning import QUIET_ENDS, QUIET_SAID, Learning, Reached, Watched, clear_fall
from prfl.training.loop import fit
from prfl.training.run_folder import RunFolder, read_metrics
from prfl.utils import rng
from prfl.utils.errors import PrflError
from tests.training.test_loop import Line, settings


class Hinged(Line):
    """A line whose loss is zero, and whose gradient too, from one step to another."""

    def __init__(self, met: range) -> None:
        super().__init__()
        self.met = met

    def accumulate(self, step, indices):
        if step in self.met:
            self.weight.grad = torch.zeros(2)
            return {"loss": 0.0, "reward": 2.0}
        return super().accumulate(step, indices) | {"reward": 1.0}


def go(tmp_path, objective, name="run", watched=None, **changes):
    run = RunFolder(tmp_path / name)
    accelerator = make_accelerator(run, "cpu", trackers=[])
    fit(objective, settings(**changes), run, accelerator=accelerator, watched=watched)
    return read_metrics(run.metrics)


def test_a_hinge_that_is_met_now_and_then_is_no_fault(tmp_path, capsys):
    go(tmp_path, Hinged(range(2, 2 + QUIET_SAID - 1)), steps=QUIET_SAID + 5)
    assert "warning" not in capsys.readouterr().out


def test_a_hinge_that_is_met_for_long_is_said_and_then_ends_the_run_saved(tmp_path, capsys):
    """And a run that is resumed counts on from the steps before it."""
    objective = Hinged(range(2, 1000))
    go(tmp_path, objective, steps=QUIET_SAID + 5, save_every=1000)
    said = capsys.readouterr().out
    assert said.count("warning: no gradient in the 10 steps up to step 12; the loss is zero") == 1
    with pytest.raises(PrflError, match=f"no gradient in the {QUIET_ENDS} steps up to step {QUIET_ENDS + 2}"):
        go(tmp_path, Hinged(range(2, 1000)), steps=1000, save_every=1000)
    assert (tmp_path / f"run/checkpoints/step-{QUIET_ENDS + 2:06d}/state.json").exists()


def test_weights_that_stop_moving_are_found_at_the_next_save(tmp_path, monkeypatch):
    apply = torch.optim.AdamW.step
    calls = []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: calls.append(1) or (apply(self) if len(calls) < 3 else None)
    )
    with pytest.raises(PrflError, match="up to step 6 none of the 1 trained tensors has moved"):
        go(tmp_path, Line(), save_every=3)
    assert (tmp_path / "run/checkpoints/step-000003").exists()


@pytest.mark.parametrize("changed", ["a little", "not at all"])
def test_what_is_not_trained_must_stay_bit_for_bit(tmp_path, changed):
    objective, base = Line(), nn.Parameter(torch.linspace(1, 2, 1000))

    class Drifting(Line):
        def accumulate(self, step, indices):
            if step == 4 and changed == "a little":
                base.data *= 1 + 2**-23
            return super().accumulate(step, indices)

    drifting = Drifting()
    watched = Watched({"base": base, "weight": drifting.weight})
    if changed == "not at all":
        go(tmp_path, drifting, watched=watched)
        return
    with pytest.raises(PrflError, match="up to step 6 1 tensors changed that are not trained, the first is base"):
        go(tmp_path, drifting, watched=watched)
    assert objective.weight is not drifting.weight


def test_looks_change_nothing(tmp_path):
    """One run is looked at after each step, the other at its end; a check of the effect that draws is none of it."""
    one, other = Line(dropout=0.5), Line(dropout=0.5)
    effects = []

    def drawing(step):
        torch.rand(3)
        effects.append(step)

    go(tmp_path, one, "often", Watched({}, drawing), save_every=1)
    go(tmp_path, other, "seldom", save_every=6)
    assert torch.equal(one.weight, other.weight) and effects[:6] == [1, 2, 3, 4, 5, 6]


def falling(count, drop, nodes=4, per_rollout=1, seed=0):
    """Rewards that differ by 10 between nodes, vary by 1 between rollouts, and fall by ``drop`` over the run."""
    own, shared = (rng.normal((1,), seed, name, 0, range(count))[:, 0].tolist() for name in ("own", "shared"))
    reached = []
    for i in range(count):
        node, rollout = i * 7 % nodes, i // per_rollout
        reached.append(Reached(rollout, float(node), 10.0 * node + 0.2 * own[i] + shared[rollout] - drop * i / count))
    return reached


def test_a_clear_fall_is_found_beside_differences_between_nodes():
    before, after, size = clear_fall(falling(200, 8.0))
    assert before - after == pytest.approx(7.0, abs=1.5) and size == 8
    assert clear_fall(falling(200, -4.0)) is None, "a rise is none"
    assert clear_fall(falling(20, 40.0)) is None, "too few to say"


@pytest.mark.parametrize("per_rollout", [1, 8])
def test_chance_is_not_called_a_fall(per_rollout):
    found = [clear_fall(falling(400, 0.0, per_rollout=per_rollout, seed=seed)) for seed in range(20)]
    assert found == [None] * 20


def test_a_fall_is_said_once_a_run_and_again_at_its_end():
    said = []
    learning = Learning({"w": nn.Parameter(torch.zeros(1))}, Watched(), said.append, rate=1e3)
    learning.recall([{"step": i, "gradient_norm": 1.0, "reward": -float(i)} for i in range(64)])
    learning.warn_of_fall(64)
    learning.warn_of_fall(65)
    assert len(said) == 1 and "the trained reward got worse: -3.5 in the first 8 rollouts, -55.5 now" in said[0]
    learning.at_end(64)
    assert len(said) == 1, "the same words are not said twice"
    learning.at_end(65)
    assert len(said) == 2
