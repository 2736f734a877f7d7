"""What to turn when memory runs out: in order, with numbers that the prediction stands by."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate.memory import predict_memory
from prfl.estimate.suggestions import Suggestion, is_out_of_memory, out_of_memory, suggest
from prfl.estimate.variants import with_keys
from prfl.runs import stage
from prfl.utils.errors import PrflError
from tests.models import copied_architecture

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."


@pytest.fixture
def make(tmp_path: Path, tiny_pipeline_folder: Path) -> Callable[..., Config]:
    (tmp_path / "prompts.txt").write_text("a circle\n")
    config = {
        "version": 1, "run": str(tmp_path / "run"), "seed": 0,
        "backbone": {"model": str(tiny_pipeline_folder), "device": "cpu", "adapter": {"rank": 2, "alpha": 2}},
        "data": {
            "prompts": {"train": str(tmp_path / "prompts.txt")}, "cache": str(tmp_path), "frames": 17, "height": 32,
            "width": 32, "fps": 8,
        },
        "reward": {"space": "latent", "path": str(tmp_path / "absent")},
        "rollout": {"steps": 6}, "objective": {"name": "prfl"},
        "training": {"steps": 5, "batch": 4, "learning_rate": 1e-4}, "evaluation": {"every": 0},
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return lambda *overrides: load_config(path, overrides)


def peak(config: Config) -> int:
    return predict_memory(config, copied_architecture(config)).peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides, some, absent",
    [
        (["backbone.device=cuda"], ["backbone.offload=true", "backbone.kernels=triton"], "reward.batch"),
        (["reward.space=pixel", "objective={name: vader}"], ["objective.frames=one"], "backbone.offload"),
        (["backbone.train=full", "backbone.adapter=null"], ["backbone.train=lora"], "backbone.kernels"),
        (
            [
                "backbone.device=cuda", "backbone.kernels=triton", "rollout.guidance={scale: 3.0, gradient: both}",
                "rollout.gradients_per_rollout=3", "rollout.drift_limit=0.2",
            ],
            ["rollout.guidance.gradient=cond", "rollout.gradients_per_rollout=1 rollout.drift_limit=0.1"],
            "backbone.kernels",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)  # fmt: skip
def test_each_suggestion_saves_what_it_says(
    make: Callable[..., Config], overrides: list[str], some: list[str], absent: str
) -> None:
    found = suggest(make(*overrides))
    assert [suggestion.saves for suggestion in found] == sorted(
        (suggestion.saves for suggestion in found), reverse=True
    )
    before = peak(make(*overrides))
    named = [suggestion for suggestion in found if any(expected in suggestion.overrides for expected in some)]
    for suggestion in dict.fromkeys([found[0], found[-1], *named]):  # as it would be typed
        assert before - peak(make(*overrides, *shlex.split(suggestion.overrides))) == suggestion.saves > 0, suggestion
    for suggestion in found:
        resumes = suggestion.overrides.split("=")[0] in ("backbone.checkpointing", "backbone.offload", "reward.batch")
        assert ("a new run" in suggestion.note) != resumes, suggestion
    for expected in some:
        assert any(expected in suggestion.overrides for suggestion in found), expected
    assert not any(absent in suggestion.overrides for suggestion in found)


@pytest.mark.slow
def test_what_the_reward_refuses_is_not_suggested(make: Callable[..., Config]) -> None:
    """The one inside the package was trained on 17 frames; and nothing is said of weights that are not there."""
    own = ["backbone.model=shapes", "reward.path=shapes", "training.accumulation=4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = [suggestion.overrides for suggestion in suggest(make(*own))]
    assert "backbone.checkpointing=full" in found and not any("frames" in overrides for overrides in found)


def test_keys_are_changed_at_any_depth(make: Callable[..., Config]) -> None:
    config = make()
    other = with_keys(config, {"backbone.checkpointing": "full", "backbone.offload": True, "training.batch": 8})
    assert (other.backbone.checkpointing, other.backbone.offload, other.training.batch) == ("full", True, 8)
    assert other.backbone.model == config.backbone.model and config.training.batch == 4


ENDS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(CPU_MESSAGE),
    MemoryError(),
]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_a_run_that_runs_out_of_memory_says_what_to_turn(
    make: Callable[..., Config], error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_stage(config: Config, resume: str) -> None:
        raise error

    some = [Suggestion("a.b=1", 3 << 30), Suggestion("c=2", 5 << 20, "worse")]
    monkeypatch.setattr("prfl.estimate.suggestions.suggest", lambda config: some)
    monkeypatch.setattr(stage, "train_stage", train_stage)
    config = make()
    with pytest.raises(PrflError, match="memory ran out") as raised:
        stage.train(config)
    told = str(raised.value)
    assert "try a.b=1 (3.00 GiB less); or c=2 (5.0 MiB less; worse)." in told
    assert str(config.run) in told and "MiB were predicted" in told


def test_other_errors_pass(make: Callable[..., Config]) -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory(make()):
        raise RuntimeError("shapes do not match")


def test_what_the_allocator_really_says() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value) and not is_out_of_memory(RuntimeError("no"))


def test_offload_without_checkpointing_is_refused(make: Callable[..., Config]) -> None:
    with pytest.raises(PrflError, match="backbone.offload"):
        make("backbone.offload=true")
    with pytest.raises(PrflError, match="reward.batch"):
        head = "reward={space: latent, batch: 2, head: {dimensions: [a], blocks: [1]}}"
        make(head, "backbone.adapter=null", "objective={name: preference, loss: bce}", "data.manifest=m")
