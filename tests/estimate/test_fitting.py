"""What to change until a run fits a card: in order, each with the peak that the prediction stands by."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest

from prfl.config.schema import Config
from prfl.estimate import fitting
from prfl.estimate.fill import SHARE
from prfl.estimate.fitting import Fit, Prediction, fit, on_gpu
from prfl.estimate.tables import GIB, fit_table
from prfl.estimate.work import H200, CardSize
from prfl.utils.console import PlainConsole

LITTLE_LEFT = ("training.accumulation=4", "backbone.checkpointing=full", "backbone.dtype=bfloat16")  # to change


def card(room: int) -> CardSize:
    """A card of which a run may take so many bytes."""
    return CardSize(1, (room + 1) / SHARE / GIB, H200, H200)


def shown(result: Fit) -> str:
    console = PlainConsole(width=140, record=True, file=open("/dev/null", "w"))
    console.print(fit_table(result))
    return console.export_text()


def test_what_fits_is_left_alone(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    before = Prediction.of(on_gpu(make()))
    monkeypatch.setattr(fitting, "Variants", lambda: None)
    result = fit(before, card(before.memory.peak))
    assert result.fits and not result.changes and "fits" in shown(result)


@pytest.mark.slow
def test_changes_are_the_predictions_and_end_where_it_fits(make: Callable[..., Config]) -> None:
    before = Prediction.of(on_gpu(make()))
    result = fit(before, card(before.memory.peak // 2))
    assert result.fits and result.changes
    overrides: list[str] = []
    for change in result.changes:
        overrides += shlex.split(change.overrides)
        assert Prediction.of(on_gpu(make(*overrides))).memory.peak == change.peak
        assert (change.peak <= result.room) == (change is result.changes[-1])
    assert "backbone.offload=true" in overrides, "what only takes longer comes first"
    text = shown(result)
    assert all(f"{number}. {change.overrides}" in text for number, change in enumerate(result.changes, 1))


@pytest.mark.slow
def test_a_smaller_video_comes_last(make: Callable[..., Config]) -> None:
    before = Prediction.of(on_gpu(make(*LITTLE_LEFT)))
    result = fit(before, card(before.always + (before.memory.peak - before.always) // 20))
    ranks = ["data.frames" in change.overrides for change in result.changes]
    assert any(ranks) and ranks == sorted(ranks)
    notes = ["shorter videos" in change.note for change in result.changes]
    assert notes == ranks and result.changes[-1].new_run


@pytest.mark.slow
def test_weights_that_are_larger_than_the_card(make: Callable[..., Config]) -> None:
    before = Prediction.of(on_gpu(make(*LITTLE_LEFT)))
    result = fit(before, card(before.always // 3))
    assert not result.fits and not any("data." in change.overrides for change in result.changes)
    assert "does not fit" in shown(result) and "what no phase frees" in shown(result)


@pytest.mark.slow
def test_what_the_config_refuses_is_no_change(make: Callable[..., Config]) -> None:
    """The reward inside the package was trained on 17 frames."""
    before = Prediction.of(on_gpu(make(*LITTLE_LEFT, "backbone.model=shapes", "reward.path=shapes")))
    result = fit(before, card(before.always + 1000))
    assert not result.fits and not any("frames" in change.overrides for change in result.changes)
