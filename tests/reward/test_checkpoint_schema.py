"""Malformed, edited and oversized configs of saved rewards: a PrflError each, and nothing large is ever made."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from prfl.backbone import load_backbone
from prfl.reward import LatentReward, Normalisation, RewardAdapter, RewardCard, RewardHead
from prfl.reward.checkpoint import read_config
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.scores import Normalisation as Scale
from prfl.utils.errors import PrflError
from tests.tiny import TEXT_WIDTH

VALUES = [
    None,
    True,
    -1,
    0,
    2,
    2**40,
    10**30,
    1e308,
    -0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [0],
    [[]],
    {},
    {"a": 1},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_pipeline_folder):
    """A latent reward with an adapter, a pixel one, and the backbone of the first."""
    folder = tmp_path_factory.mktemp("rewards")
    card = RewardCard(frames=(5, 5), fps=(8.0, 8.0), accuracy={"light": {"0-0.2": 0.8}}, pairs={"light": 40})
    adapter = RewardAdapter(rank=2, alpha=2.0, targets=("to_q",))
    head = RewardHead(24, ["light"], inner=8, hidden=8)
    LatentReward(head, load_backbone(tiny_pipeline_folder), [0], adapter, card=card).save_pretrained(folder / "latent")
    PixelReward(PixelNetwork(TEXT_WIDTH, ["light"], hidden=8, inner=8), card=card).save_pretrained(folder / "pixel")
    return folder


def places(value, path=()):
    """The path of every value inside a JSON value, but of the lists' items."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from places(inner, (*path, key))


def section(config, path):
    for key in path[:-1]:
        config = config[key]
    return config


def malformed(config):
    """Each value of a config in turn missing, of another kind or size, or with a stranger beside it."""
    for path in places(config):
        for value in VALUES:
            changed = json.loads(json.dumps(config))
            section(changed, path)[path[-1]] = value
            yield changed
        changed = json.loads(json.dumps(config))
        del section(changed, path)[path[-1]]
        yield changed
        changed = json.loads(json.dumps(config))
        section(changed, path)["stranger"] = 1
        yield changed


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_no_malformed_config_is_a_traceback(saved, tmp_path, tiny_backbone, kind):
    """As an older reward without a hash, which would notice any of them; where it loads, what it says makes sense."""
    folder = shutil.copytree(saved / kind, tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    del config["config_sha256"]
    cases = list(malformed(config))
    refused = 0
    for number, changed in enumerate(random.Random(0).sample(cases, 300)):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            read_config(folder)
            if kind == "latent":
                reward = LatentReward.from_pretrained(folder, tiny_backbone, adapter_name=f"reward-{number}")
            else:
                reward = PixelReward.from_pretrained(folder)
            assert all(value > 0 for value in reward.normalisation.std.values())
        except PrflError as error:
            refused += 1
            assert error.where and error.fix and len(str(error)) < 1500, error
    assert refused > 200


@pytest.mark.parametrize("sizes", [{"hidden": 60_000}, {"n_queries": 2**20}, {"inner": 2**16, "heads": 1}])
def test_nothing_of_the_claimed_size_is_made_before_the_weights_are_looked_at(
    saved, tmp_path, tiny_backbone, monkeypatch, sizes
):
    folder = shutil.copytree(saved / "latent", tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    del config["config_sha256"]
    config["head"] |= sizes
    (folder / "config.json").write_text(json.dumps(config))
    made = []

    def watching(*given, **named):
        head = RewardHead(*given, **named)
        made.append({parameter.device.type for parameter in head.parameters()})
        return head

    monkeypatch.setattr("prfl.reward.latent.RewardHead", watching)
    with pytest.raises(PrflError, match="by the config, and"):
        LatentReward.from_pretrained(folder, tiny_backbone)
    assert made == [{"meta"}]


def test_an_edited_config_is_refused_and_what_people_may_edit_is_not(saved, tmp_path, tiny_backbone):
    folder = shutil.copytree(saved / "latent", tmp_path / "reward")
    config = json.loads((folder / "config.json").read_text())
    config["card"]["labels"] = {"light": "the picture is bright"}
    config["backbone"]["model_id"] = "owner/name"
    (folder / "config.json").write_text(json.dumps(config))
    assert LatentReward.from_pretrained(folder, tiny_backbone, adapter_name="one").card.labels
    for path, value in ((("normalisation", "mean", "light"), 0.1), (("adapter", "alpha"), 2.5), (("head", "heads"), 2),
                        (("card", "accuracy", "light", "0-0.2"), 0.9)):  # fmt: skip
        changed = json.loads(json.dumps(config))
        section(changed, path)[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(PrflError, match="was edited since the reward was saved"):
            LatentReward.from_pretrained(folder, tiny_backbone, adapter_name=f"edited {path[1]}")
        del changed["config_sha256"]  # as rewards were saved before there was a hash
        (folder / "config.json").write_text(json.dumps(changed))
        LatentReward.from_pretrained(folder, tiny_backbone, adapter_name=f"older-{path[1]}")


@pytest.mark.parametrize("deviation", [-1.0, 0.0, float("inf"), float("nan")])
def test_a_deviation_that_turns_scores_round_or_divides_by_nothing(deviation):
    with pytest.raises(PrflError, match="cannot be normalised"):
        Scale({"light": 0.0}, {"light": deviation})


def test_scores_that_vary_by_rounding_do_not_vary():
    noise = 1e-7 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(PrflError, match="do not vary"):
        Normalisation.of({"light": 5 + noise})
    assert Normalisation.of({"light": 5 + 1e3 * noise}).std["light"] < 1e-3
