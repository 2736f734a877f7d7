"""Pieces of the rewards that others trained: every one has its piece, and each runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import YolosConfig, YolosForObjectDetection

from bench.cases import reward_cases
from bench.cases.piece_cases import LATENT
from bench.harness import study_tables
from bench.harness.report import SHARE, TFLOP
from prfl.backbone.condition import Ask, Condition
from prfl.factory.reward import PUBLIC_REWARDS
from prfl.reward.watched import ObjectReward
from tests.reward.tiny_rewards import all_rewards

REPOSITORY = Path(__file__).parents[2]


def small(name: str) -> Callable[[], Any]:
    """A tiny network of the kind in place of one of the published size."""

    def make() -> Any:
        reward = all_rewards()[name]()
        for network in reward.networks:
            network.float()
        return reward

    return make


def test_every_reward_has_its_piece() -> None:
    assert len(reward_cases.KINDS) == len(PUBLIC_REWARDS) - 2
    (large,) = reward_cases.cases("wan-1.3b")
    assert {"videoalign", "hpsv3", "mps", "coherence", LATENT} <= set(large.providers)
    (case,) = reward_cases.cases("tiny")
    assert {LATENT, *reward_cases.KINDS} - set(case.providers) == set(reward_cases.NOT_ON_CPU)


@pytest.mark.slow
def test_whole_networks_are_measured_beside_the_latent_head(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "object", "videoalign"
    monkeypatch.setattr(reward_cases, "KINDS", {name: small(name) for name in names})
    problem = reward_cases.reward("tiny")
    assert set(problem.works) == {LATENT, *names}
    gradient = problem.works[LATENT]().run(None)["gradient"]
    assert gradient.abs().amax() > 0
    for name in names:
        assert problem.works[name]().run(None) is None


def six_layers() -> ObjectReward:
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    config = YolosConfig(**sizes, image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3)
    return ObjectReward(YolosForObjectDetection(config), [config.id2label[0]])


def test_on_a_cpu_the_first_layers_stand_for_all_and_their_share_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the layers are a half of the arithmetic but for the patches and the head, and the weights are drawn."""
    monkeypatch.setattr(reward_cases, "KINDS", {"object": six_layers})
    plain = reward_cases.config("tiny")
    with torch.device("meta"):
        size = 1, 3, 1, plain.data.height, plain.data.width
        whole = reward_cases.arithmetic(six_layers(), size, Condition({}, (Ask("x"),)))
    monkeypatch.setattr(reward_cases, "CPU_TFLOP", whole / 2)
    work = reward_cases.shortened("object", plain)
    assert work.facts[TFLOP] < whole and 0.5 <= work.facts[SHARE] == work.facts[TFLOP] / whole < 0.7
    work.run(None)
    assert all(tensor.isfinite().all() for tensor in work.constant)


def test_the_shortened_networks_have_every_stack_shortened() -> None:
    reward = six_layers()
    reward_cases.shorten(reward, 0.01)
    assert [len(stack) for stack, _ in reward_cases.stacks(six_layers())] == [6]
    assert not list(reward_cases.stacks(reward)) and len(reward.network.vit.encoder.layer) == 1


def test_the_page_has_every_reward() -> None:
    text = study_tables.of_files("public_rewards", REPOSITORY / "bench/results/public_rewards.json")
    assert all(f"| `{name}` |" in text for name in (*reward_cases.KINDS, "critic")) and "| latent reward |" in text
    (case,) = reward_cases.cases("tiny")
    measured = study_tables.of_files("public_rewards_cpu", REPOSITORY / "bench/results/public_rewards_cpu.json")
    assert all(f"| {name} |" in measured.replace("`", "") for name in case.providers)
