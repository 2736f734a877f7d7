"""``checkpointing: auto``: it keeps what there is room for, in the order of its worth, and changes no gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from prfl.backbone.checkpointing import Checkpointing, stretches
from prfl.config.schema import Config
from prfl.estimate import fill
from prfl.estimate.live_tensors import SavedBytes
from prfl.estimate.memory import predict_memory
from prfl.factory.backbone import POLICY, build_architecture, build_backbone
from prfl.utils.errors import PrflError
from tests.models import copied_architecture
from tests.objective.parts import stir

AUTO = "backbone.checkpointing=auto"


def peak(config: Config, mode: str) -> int:
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"checkpointing": mode})})
    return predict_memory(config, copied_architecture(config)).training_peak


@pytest.mark.slow
def test_it_keeps_more_the_more_room_there_is(make: Callable[..., Config]) -> None:
    config = make(AUTO)
    least, attention = (peak(config, mode) for mode in ("full", "attention"))
    assert fill.fill(config, least - 1).modes() == ("full",) * 5  # and the run may not fit at all
    between = fill.fill(config, (least + attention) // 2)
    assert 0 < between.attention < 5 and between.whole == between.reward_attention == 0
    assert between.modes().count("attention") == between.attention and between.modes()[-1] == "full"


@pytest.mark.slow
def test_what_it_keeps_fits(make: Callable[..., Config]) -> None:
    config = make(AUTO)
    least, attention = (peak(config, mode) for mode in ("full", "attention"))
    everything = fill.fill(config, 2**40)
    assert everything.modes() == ("none",) * 5 and everything.reward_modes() == ("none",)
    most = everything.peak  # of a graph that is held beside the reward's, so more than with checkpointing: none
    for available in (least, (2 * attention + most) // 3):
        filled = fill.fill(config, available)
        model = build_architecture(config)
        filled.put_into(model)
        assert predict_memory(config, model).training_peak <= filled.peak <= available


MIXED: tuple[Checkpointing, ...] = ("full", "full", "attention", "none", "none")


def test_blocks_that_keep_different_things_give_the_same_gradients(make: Callable[..., Config]) -> None:
    config = make(AUTO)
    latents = torch.randn(2, 4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients, kept = {}, {}
    for name, modes in {"full": ("full",) * 5, "mixed": MIXED, "none": ("none",) * 5}.items():
        model = build_backbone(config)
        stir(model, POLICY, seed=1)
        model.running.block_modes = model.running.feature_modes = modes
        condition, sigma = model.condition(["a red circle", "a"]), torch.tensor(0.5)
        parameters = list(model.parameters(POLICY).values())
        with SavedBytes(list(model.transformer.parameters())) as saved, model.adapter(POLICY):
            velocity = model.velocity(latents, sigma, condition)
            (features,) = model.features(latents, sigma, condition, [2])
            gradients[name] = torch.autograd.grad(velocity.square().sum() + features.sin().sum(), parameters)
        kept[name] = saved.peak
    for ours, theirs in zip(gradients["mixed"], gradients["none"], strict=True):
        assert torch.equal(ours, theirs)
    assert kept["full"] < kept["mixed"] < kept["none"]


def test_full_checkpoints_of_several_blocks_stay_together() -> None:
    modes: tuple[Checkpointing, ...] = ("full", "full", "full", "none", "full")
    assert list(stretches(modes, 2)) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert list(stretches(modes, 1)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(stretches(("full",) * 5, 2)) == [(0, 2), (2, 4), (4, 5)]


@pytest.mark.slow
def test_without_a_card_it_is_full(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(AUTO)
    model = build_backbone(config)
    assert fill.fill_card(config, model).startswith("full; ") and model.running.block_modes is None
    monkeypatch.setattr(fill, "room", lambda config: 2**40)
    said = fill.fill_card(config, model)
    assert said.startswith("of 5 blocks 5 are kept whole") and model.running.block_modes == ("none",) * 5


def test_with_offload_it_is_refused(make: Callable[..., Config]) -> None:
    with pytest.raises(PrflError, match="backbone.offload: checkpointing: auto fills the GPU"):
        make(AUTO, "backbone.offload=true")
