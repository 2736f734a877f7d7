"""Several rewards at once: each gradient at the pixels by itself, one backward pass of the decoder, and the balance."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from prfl.backbone import Backbone
from prfl.backbone.condition import Ask, Condition
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward
from prfl.reward.public import FrozenReward
from prfl.reward.scorer import JointScorer, LatentScorer, PixelScorer
from prfl.reward.scores import total
from prfl.reward.several import LatentBeside, SeveralRewards
from prfl.utils.errors import PrflError

WEIGHTS = {"steep": 2.0, "flat": 1.0, "bent": -0.5, "level": 1.0, "none": 1.0}
CONDITION = Condition({}, (Ask("a dog"), Ask("a cat"), Ask("")))


class Own(FrozenReward):
    """A reward of these functions of the pixels; ``order`` says whose gradient came to the pixels when."""

    order: list[str] = []

    def __call__(self, pixels, condition, times=None):
        pixels = pixels * 1.0
        pixels.register_hook(lambda _: self.order.append(self.dimensions[0]))
        return {name: FUNCTIONS[name](pixels) for name in self.dimensions}


FUNCTIONS = {
    "steep": lambda x: 1000 * x.square().sum((1, 2, 3, 4)),
    "flat": lambda x: 1e-3 * x.sin().sum((1, 2, 3, 4)),
    "bent": lambda x: x[:, 0].exp().mean((1, 2, 3)),
    "none": lambda x: 0 * x.mean((1, 2, 3, 4)),
    "level": lambda x: 0 * x.sum((1, 2, 3, 4)),
}


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Something that bends; its gradient must be taken at the sum of the rewards' gradients."""
    return (latents.repeat(1, 3, 2, 1, 1) + 0.1).tanh()


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(3, 1, 2, 4, 5, generator=torch.Generator().manual_seed(0)).double()


def by_autograd(latents: torch.Tensor, groups: list[list[str]], weights: Mapping[str, float]) -> list[torch.Tensor]:
    """Each reward's gradient at the pixels, one joint graph each."""
    pixels = decode(latents).requires_grad_()
    parts = [sum(weights[name] * FUNCTIONS[name](pixels) for name in names) for names in groups]
    return [torch.autograd.grad(part.sum(), pixels, retain_graph=True)[0] for part in parts]


def followed(latents: torch.Tensor, groups: list[list[str]], balance: str) -> torch.Tensor:
    """The gradient at the latents as an objective takes it."""
    leaf = latents.clone().requires_grad_()
    rewards = SeveralRewards([Own(names) for names in groups], WEIGHTS, balance)  # type: ignore[arg-type]
    scores = rewards(decode(leaf), CONDITION[list(range(len(latents)))])
    value = total(scores, {name: WEIGHTS[name] for names in groups for name in names})
    return torch.autograd.grad(value.sum(), leaf)[0]


def pulled_back(latents: torch.Tensor, at_pixels: torch.Tensor) -> torch.Tensor:
    leaf = latents.clone().requires_grad_()
    return torch.autograd.grad(decode(leaf), leaf, at_pixels)[0]


GROUPS = [["steep"], ["flat", "bent"], ["level"]]


def test_without_balance_gradients_add(latents: torch.Tensor) -> None:
    """And one reward's graph is done with before the next one's is differentiated."""
    Own.order.clear()
    expected = pulled_back(latents, torch.stack(by_autograd(latents, GROUPS, WEIGHTS)).sum(0))
    torch.testing.assert_close(followed(latents, GROUPS, "none"), expected)
    assert Own.order == ["steep", "flat", "level"], "each once, in turn"


def test_balanced_gradient_is_that_of_its_equation(latents: torch.Tensor) -> None:
    """For each video by itself; a level reward is left out; the sum of the lengths stays."""
    steep, bent, _ = by_autograd(latents, GROUPS, WEIGHTS)
    expected = torch.zeros_like(steep)
    for video in range(3):
        lengths = steep[video].norm(), bent[video].norm()
        unit = 2.0 * steep[video] / lengths[0] + 1.5 * bent[video] / lengths[1]
        expected[video] = (lengths[0] + lengths[1]) / 3.5 * unit
    torch.testing.assert_close(followed(latents, GROUPS, "gradient_norm"), pulled_back(latents, expected))
    alone = followed(latents[1:2], GROUPS, "gradient_norm")
    torch.testing.assert_close(alone, followed(latents, GROUPS, "gradient_norm")[1:2])


def test_balance_of_one_and_of_none(latents: torch.Tensor) -> None:
    """One reward with a gradient keeps it, and zero is not divided by zero."""
    (steep,) = by_autograd(latents, [["steep"]], WEIGHTS)
    both = followed(latents, [["steep"], ["level"]], "gradient_norm")
    torch.testing.assert_close(both, pulled_back(latents, steep))
    assert not followed(latents, [["level"], ["none"]], "gradient_norm").any()


def test_two_rewards_of_one_name_are_refused() -> None:
    with pytest.raises(PrflError, match="two rewards score 'steep'"):
        SeveralRewards([Own(["steep"]), Own(["steep"])])


def test_a_latent_reward_beside_a_pixel_one_adds_its_gradient(tiny_backbone: Backbone) -> None:
    torch.manual_seed(0)
    head = LatentReward(
        RewardHead(tiny_backbone.facts.width_after([0]), ["light"], inner=8), tiny_backbone, [0]
    ).freeze()
    pixel = Own(["bent"])
    latent_scorer, pixel_scorer = LatentScorer(head), PixelScorer(pixel, tiny_backbone, seed=0)
    joint = JointScorer(latent_scorer, pixel_scorer)
    beside = LatentBeside(head, pixel)
    assert beside.dimensions == ("light", "bent") and beside.normalisation.mean == {"light": 0.0, "bent": 0.0}
    assert joint.differentiable and not joint.noise_aware

    condition = tiny_backbone.condition(["a dog"])
    clean, sigma = torch.randn(1, 4, 3, 4, 4), torch.zeros(1)

    def gradient(scorer) -> torch.Tensor:
        leaf = clean.clone().requires_grad_()
        with scorer.selected():
            scores = scorer(leaf, sigma, condition, 0)
            return torch.autograd.grad(torch.stack(list(scores.values())).sum(), leaf)[0]

    torch.testing.assert_close(gradient(joint), gradient(latent_scorer) + gradient(pixel_scorer))
    with pytest.raises(PrflError, match="two rewards score 'light'"):
        LatentBeside(head, Own(["light"]))
