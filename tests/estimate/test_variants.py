"""Configs that are measured one after another on what was built for the first: each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prfl.config.schema import Config
from prfl.estimate import fill, variants
from prfl.estimate.fitting import on_gpu
from prfl.estimate.memory import predict_memory
from prfl.estimate.variants import Variants, with_keys
from prfl.factory.backbone import build_architecture

CHANGED = [
    {"backbone.checkpointing": "attention", "reward.batch": 1},
    {"backbone.offload": True, "data.encode_batch": 3},
    {"training.accumulation": 4, "evaluation.batch": 2},
]


@pytest.fixture(scope="module")
def evaluated(make_once: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    prompts = tmp_path_factory.mktemp("prompts") / "validation.txt"
    prompts.write_text("a square\n")
    drawn = "evaluation={every: 5, prompts_per_round: 1, samples_per_prompt: 8, batch: 8}"
    return make_once("backbone.checkpointing=full", drawn, f"data.prompts.validation={prompts}")


@pytest.mark.slow
def test_what_is_used_again_is_measured_as_if_it_were_new(evaluated: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {key for changes in CHANGED for key in changes} == variants.MEASURED_KEYS.keys()
    first = on_gpu(evaluated)
    configs = [*(with_keys(first, changes) for changes in CHANGED), first]
    alone = [predict_memory(config, build_architecture(config)) for config in configs]
    built = []
    monkeypatch.setattr(
        variants, "build_architecture", lambda config: built.append(config) or build_architecture(config)
    )
    search = Variants()
    assert [search.run(config).memory() for config in configs] == alone
    assert len(built) == 1


@pytest.mark.parametrize("changes", [{"backbone.dtype": "bfloat16"}, {"data.frames": 9}], ids=str)
def test_another_model_or_video_is_built_anew(make_once: Callable[..., Config], changes: dict[str, object]) -> None:
    config = make_once()
    other = with_keys(config, changes)
    search = Variants()
    first, second = search.run(config), search.run(other)
    assert second.model is not first.model
    assert search.run(config).model is first.model, "the one before is remembered"


def test_a_base_that_is_trained_is_built_anew(make_once: Callable[..., Config]) -> None:
    config = make_once("backbone.train=full", "backbone.adapter=null")
    search = Variants()
    assert search.run(config).model is not search.run(config).model


def test_a_phase_that_no_block_changes_leaves_no_room(evaluated: Config) -> None:
    """The decoder of eight samples is larger than any step, and than the card."""
    assert fill.fill(with_keys(evaluated, {"backbone.checkpointing": "auto"}), 1).modes() == ("full",) * 5
