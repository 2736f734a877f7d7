"""What a step costs where two experts are not guided alike."""

from __future__ import annotations

import pytest
import torch

from prfl.backbone import load_backbone
from prfl.backbone.guidance_scale import Scale, ScaleOfExperts, ScaleOfFrames
from prfl.rollout.sampling import SamplingSettings
from prfl.steering.best_of import BestOf
from prfl.steering.budget import calls_of
from prfl.steering.calls import Calls
from prfl.steering.guidance import gradient_price
from prfl.steering.process import Look
from prfl.steering.sampling import prices_of, process_of
from tests.objective.parts import PROMPTS
from tests.wan_experts import save_tiny_experts
from tests.wan_image import SHAPE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return load_backbone(save_tiny_experts(tmp_path_factory.mktemp("experts") / "tiny-a14b"))


@pytest.mark.parametrize(
    ("scale", "whole"),
    [
        (ScaleOfExperts(1.0, 3.0), 2 + 6),
        (ScaleOfExperts(4.0, 1.0), 4 + 3),
        (ScaleOfExperts(4.0, 3.0), 10),
        (ScaleOfFrames(1.0, 3.0), 10),
        (3.0, 10),
        (1.0, 5),
    ],
)
def test_an_expert_without_guidance_is_paid_once(
    model, scale: Scale, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At shift 3 and 5 steps two are the high-noise expert's; as many calls are foretold, counted and made."""
    settings, looks = SamplingSettings(9, 16, 16, 5, guidance_scale=scale), [Look(lambda x, *_: x.flatten(1).sum(1))]
    schedule, method = settings.chain(model, SHAPE), BestOf(3, 1, (0.6,))
    made, velocity = [], model.velocity
    monkeypatch.setattr(model, "velocity", lambda x, *rest: made.append(len(x)) or velocity(x, *rest))
    steered = method(process_of(model, PROMPTS[:1], [0], settings, schedule, looks))
    prices = prices_of(model.facts, scale)
    early = sum(prices.at(sigma) for sigma in schedule.sigmas[:3])
    assert sum(prices.at(sigma) for sigma in schedule.sigmas[:-1]) == whole
    assert sum(made) == steered.calls.policy == 3 * early + (whole - early)
    assert calls_of(method, schedule, looks, prices).policy == steered.calls.policy


def test_a_gradient_is_priced_where_it_is_taken(model) -> None:
    scale, clean = ScaleOfExperts(1.0, 3.0), [Look(lambda x, *_: x.flatten(1).sum(1), clean=True, calls=1.0)]
    settings = SamplingSettings(9, 16, 16, 5, guidance_scale=scale)
    process = process_of(model, PROMPTS[:1], [0], settings, settings.chain(model, SHAPE), clean)
    assert [gradient_price(process, torch.tensor(sigma)) for sigma in (0.95, 0.3)] == [
        Calls(policy=2.0, reward=3.0), Calls(policy=4.0, reward=3.0),
    ]  # fmt: skip
