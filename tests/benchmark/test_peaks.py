"""Predicted and measured memory of a step: the same phases, and each by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.harness import bundle
from bench.harness.peaks import measured_peaks, predicted_peaks
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate.memory import predict_memory
from prfl.factory.backbone import build_architecture
from prfl.objective import reward_gradient
from prfl.utils.timing import Clock

ALONE = "data.generator=null", "training.steps=2", "evaluation.every=0", "rollout.gradients_per_rollout=1"
TINY = ("reward.path=shapes", "objective={name: prfl}", *ALONE)


def config(*overrides: str) -> Config:
    return load_config("configs/tiny/prfl.yaml", ["backbone.device=cuda", *TINY, *overrides])


@pytest.mark.slow
def test_what_a_step_never_has_is_not_in_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of many samples takes more than a step of one; the text encoder has a phase of its own.  A held
    edge's graph is made in the rollout."""
    many = config("training.batch=1", "evaluation.final_samples=64", "backbone.checkpointing=full")
    memory = predict_memory(many, build_architecture(many))
    monkeypatch.setattr("bench.harness.peaks.predict_memory", lambda *_: memory)
    peaks = predicted_peaks(many)
    assert peaks.keys() == {"peak", "rollout", "reward", "backward", "optimizer"}
    assert memory.training_peak > peaks["peak"] == max(size for name, size in peaks.items() if name != "peak")
    fixed = sum(part.bytes for part in memory.fixed)
    named = {name: phase for phase in memory.phases for name in ("rollout", "walk back") if phase.name.startswith(name)}
    assert peaks["backward"] == fixed + named["walk back"].bytes
    assert peaks["rollout"] == fixed + named["rollout"].bytes + named["walk back"].saved
    again = many.model_copy(update={"backbone": many.backbone.model_copy(update={"checkpointing": "none"})})
    assert predicted_peaks(again)["rollout"] == fixed + named["rollout"].bytes


class Allocator:
    """In the place of torch's, on a GPU."""

    peak = 0

    def reset(self) -> None:
        self.peak = 1


def test_each_phase_has_its_own_peak_and_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Allocator()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: own.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", own.reset)
    own.peak = 99  # of loading
    with measured_peaks() as peaks:
        clock = reward_gradient.Clock(torch.device("cpu"))
        for rollout, between in ((5, 9), (6, 2)):
            with clock("rollout"):
                own.peak = rollout
            own.peak = max(own.peak, between)
            with clock("reward"):
                own.peak = 7
        own.peak = 8  # of the optimizer
    assert peaks == {"peak": 9, "rollout": 6, "reward": 7}
    assert clock.seconds.keys() == {"rollout", "reward"} and reward_gradient.Clock is Clock


def test_the_report_has_each_phase_beside_its_prediction() -> None:
    info: dict[str, Any] = {"case": "step", "provider": "full", "measured": {"peak": 10**10, "distance": 1}}
    line = {"part": "small-step", "row": "step", "extra_info": info | {"predicted": {"peak": 11 * 10**9}}}
    assert bundle.peaks([line]) == ["step, full: peak 10.0 GB, predicted 11.0 GB (+10.0%)"]
    assert bundle.peaks([line | {"extra_info": info}]) == []
