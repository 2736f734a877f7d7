"""What rewards that others trained are predicted to hold, against real passes of tiny ones of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl.backbone import Backbone, Condition
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate import phases
from prfl.estimate.fitting import Prediction, fit
from prfl.estimate.live_tensors import LiveBytes, fused_on_meta
from prfl.estimate.memory import reward_tensors
from prfl.estimate.parts import Shapes
from prfl.estimate.work import CARD_SIZES
from prfl.factory.backbone import build_architecture, build_backbone
from prfl.factory.objective import build_scorer
from prfl.reward.several import SeveralRewards
from tests.estimate.test_memory import inputs
from tests.reward.tiny_rewards import all_rewards
from tests.slow import slow_unless

REPOSITORY = Path(__file__).parents[2]
KINDS = ("imagereward", "mps", "videoalign", "hpsv3", "object", "action", "coherence")


def several() -> Any:
    return SeveralRewards([all_rewards()[name]() for name in ("imagereward", "object")], balance="gradient_norm")


@dataclass(frozen=True)
class Decoded:
    """A run that follows a reward on decoded pixels: what all rewards share of it."""

    config: Config
    model: Backbone
    empty: Backbone
    leaf: torch.Tensor
    condition: Condition


@pytest.fixture(scope="module")
def decoded(make_once: Callable[..., Config]) -> Decoded:
    config = make_once("reward.space=pixel", "objective={name: vader}", "reward.shape=linear", "data.frames=5")
    model = build_backbone(config)
    leaf = torch.randn(2, *model.latent_shape(5, 32, 32)).requires_grad_()
    return Decoded(config, model, build_architecture(config), leaf, inputs(model)[1])


@pytest.mark.parametrize("name", slow_unless("several".__eq__, [*KINDS, "several"]))
def test_reward_and_decoder_are_predicted_at_their_peak(decoded: Decoded, name: str) -> None:
    """Forward and backward together; the weights to the byte."""
    kind = several if name == "several" else all_rewards()[name]
    reward = kind()
    scorer = build_scorer(decoded.config, decoded.model, reward)
    with LiveBytes() as counted:
        scores = scorer(decoded.leaf, torch.tensor(0.0), decoded.condition, 0)
        torch.autograd.grad(torch.stack(list(scores.values())).sum(), decoded.leaf)

    with torch.device("meta"):
        on_meta = kind()
    shapes = Shapes(decoded.empty, decoded.config)
    with fused_on_meta("cpu"):
        *_, part = phases.reward_phases(decoded.config, decoded.empty, on_meta, shapes, 2, held=0)
    assert part.bytes == pytest.approx(counted.peak, rel=0.1)
    assert sum(t.nbytes for t in reward_tensors(on_meta)) == sum(t.nbytes for t in reward_tensors(reward))


@pytest.mark.slow
def test_the_published_geometry_of_a_rival_on_eight_fits_one() -> None:
    """Wan 2.1 1.3B, 81 frames of 480 x 832, guidance 5, one step of 25, with VideoAlign: on one GPU of 80 GB."""
    config = load_config(REPOSITORY / "configs/wan2.1-1.3b/videoalign.yaml")
    data, rollout = config.data, config.rollout
    assert (data.frames, data.height, data.width) == (81, 480, 832) and config.training.batch == 8
    assert rollout.steps == 25 and rollout.guidance.scale == 5 and config.objective.last_steps == 1
    prediction = Prediction.of(config)
    weights = next(part for part in prediction.memory.fixed if part.name == "reward weights")
    assert weights.bytes == pytest.approx(2 * 2.209e9, rel=0.01), "Qwen2-VL-2B without its last layer, in bfloat16"
    card = CARD_SIZES[80]
    result = fit(prediction, card)
    assert result.fits and not result.changes
