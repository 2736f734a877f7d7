"""Pieces of the rewards that others trained: every one has its piece, and each runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import reward_cases
from bench.cases.piece_cases import LATENT
from prfl.factory.reward import PUBLIC_REWARDS
from tests.reward.tiny_rewards import all_rewards


def small(name: str) -> Callable[[], Any]:
    """A tiny network of the kind in place of one of the published size."""

    def make() -> Any:
        reward = all_rewards()[name]()
        for network in reward.networks:
            network.float()
        return reward

    return make


@pytest.mark.slow
def test_each_reward_is_measured_beside_the_latent_head(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(reward_cases.KINDS) == len(PUBLIC_REWARDS) - 2
    (large,) = reward_cases.cases("wan-1.3b")
    assert {"videoalign", "hpsv3", "mps", "coherence", LATENT} <= set(large.providers)
    (case,) = reward_cases.cases("tiny")
    names = "object", "videoalign"
    monkeypatch.setattr(reward_cases, "KINDS", {name: small(name) for name in names})
    problem = reward_cases.reward("tiny")
    assert set(problem.works) == {LATENT, *names}
    gradient = problem.works[LATENT]().run(None)["gradient"]
    assert gradient.abs().amax() > 0
    for name in names:
        assert problem.works[name]().run(None) is None
