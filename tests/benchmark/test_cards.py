"""The figures of the models on the cards, and the headers of the configs that state them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.predicted_cards import MODELS as CASES
from bench.predicted_cards import kept, needed, row
from prfl.estimate.fitting import Change
from prfl.estimate.units import GIB
from prfl.estimate.work import CARD_SIZES

REPOSITORY = Path(__file__).parents[2]
MODELS = json.loads((REPOSITORY / "bench/results/cards.json").read_text(encoding="utf-8"))["models"]


@pytest.mark.parametrize("name", ["1.3B 480p", "14B 720p"])
def test_the_headers_have_the_figures(name: str) -> None:
    model = MODELS[name]
    header = (REPOSITORY / model["config"]).read_text(encoding="utf-8").split("version:")[0]
    assert f"{model['peak GiB as shipped']:.1f} GiB" in header
    for card in model["cards"].values():
        assert f"{card['peak GiB']:.1f} GiB" in header or not card["fits"]


@pytest.mark.parametrize("name", [name for name in MODELS if "VADER" in name or "DRaFT" in name])
def test_the_headers_of_public_rewards_have_the_peak(name: str) -> None:
    header = (REPOSITORY / MODELS[name]["config"]).read_text(encoding="utf-8").split("version:")[0]
    assert f"{MODELS[name]['peak GiB as shipped']:.1f} GiB at the peak" in header


def test_what_is_needed_is_the_least_that_fits() -> None:
    changes = tuple(Change(name, "", size * GIB, False) for name, size in (("a=1", 60), ("b=2", 40)))
    assert needed(20 * GIB, changes, CARD_SIZES[24]) == ()
    assert needed(80 * GIB, changes, CARD_SIZES[80]) == changes[:1]
    assert needed(80 * GIB, changes, CARD_SIZES[48]) == changes
    assert needed(80 * GIB, changes, CARD_SIZES[24]) is None


def test_what_is_not_counted_anew_stays_with_its_commit(tmp_path: Path) -> None:
    file = tmp_path / "cards.json"
    assert kept(file, ["1.3B 480p"]) == {}
    file.write_text(json.dumps({"commit": "abc", "models": {"1.3B 480p": {"steps": 1}, "14B 480p": {"steps": 2}}}))
    assert kept(file, ["1.3B 480p"]) == {"14B 480p": {"commit": "abc", "steps": 2}}


def test_every_config_of_a_public_reward_is_among_them() -> None:
    folder = REPOSITORY / "configs/wan2.1-1.3b"
    named = {config for config, _ in CASES.values()}
    configs = [*folder.glob("vader*.yaml"), folder / "videoalign.yaml"]
    assert {str(path.relative_to(REPOSITORY)) for path in configs} <= named


def test_a_row_says_how_it_fits() -> None:
    texts = row("14B 720p", MODELS["14B 720p"]).split(" | ")
    assert texts[2] == "no" and texts[4].startswith("backbone.offload=true: 52.1 GiB") and "as shipped" in texts[5]
