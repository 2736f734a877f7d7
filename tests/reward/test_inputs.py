"""What a latent reward is given: numbers, texts, one for all samples; and what is no such thing says how to mend it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prfl.reward import LatentReward, Normalisation, RewardAdapter, RewardCard, RewardEnsemble, RewardHead
from prfl.reward.inputs import check_latents
from prfl.utils.errors import PrflError

PROMPTS = ["a red circle moves left", "a blue square"]


@pytest.fixture
def reward(tiny_backbone) -> LatentReward:
    torch.manual_seed(0)
    head = RewardHead(tiny_backbone.facts.widths[0], ["motion", "look"], blocks=1, inner=16, heads=2, hidden=16)
    return LatentReward(head, tiny_backbone, [1])


@pytest.fixture
def latents(tiny_backbone) -> Tensor:
    return torch.randn(2, *tiny_backbone.latent_shape(5, 16, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.7, [0.7, 0.7], torch.tensor(0.7), torch.tensor([0.7], dtype=torch.float64)])
def test_a_sigma_for_all_samples_is_a_number_or_one_each(reward: LatentReward, latents: Tensor, sigma) -> None:
    exact = reward(latents, torch.tensor([0.7, 0.7]), reward.backbone.condition(PROMPTS))["motion"]
    assert torch.equal(reward.score(latents, sigma, PROMPTS)["motion"], exact)


def test_one_prompt_stands_for_all_samples(reward: LatentReward, latents: Tensor) -> None:
    twice = reward.score(latents, 0, [PROMPTS[0]] * 2)["look"]
    for prompt in (PROMPTS[0], PROMPTS[:1], reward.backbone.condition(PROMPTS[:1])):
        assert torch.equal(reward.score(latents, 0, prompt)["look"], twice)


def test_one_latent_at_several_noise_levels_and_of_several_prompts(reward: LatentReward, latents: Tensor) -> None:
    repeated = latents[:1].expand(2, -1, -1, -1, -1)
    exact = reward(repeated, torch.tensor([0.0, 1.0]), reward.backbone.condition(PROMPTS))["motion"]
    assert torch.equal(reward.score(latents[0], [0, 1], PROMPTS)["motion"], exact)


def test_a_score_keeps_no_graph_and_a_call_does(reward: LatentReward, latents: Tensor) -> None:
    latents.requires_grad_()
    assert not reward.score(latents, 0.5, PROMPTS)["motion"].requires_grad
    reward(latents[:1], [0.5, 0.6], PROMPTS[0])["motion"].sum().backward()
    assert latents.grad is not None and latents.grad[0].abs().max() > 0 and latents.grad[1].abs().max() == 0


@pytest.mark.parametrize(
    ("sigma", "prompts", "message"),
    [
        (1.001, "a", "1.001 is no noise level.*divide it by 1000"),
        ([0.5, -0.1], "a", "-0.1 is no noise level"),
        (torch.tensor([0.5, torch.nan]), "a", "nan is no noise level"),
        (torch.zeros(2, 1), "a", "noise levels of shape"),
        (0.5, ["a"] * 3, "2 latents, 1 sigmas, 3 prompts.*one for each sample"),
        ([0.1, 0.2, 0.3], "a", "2 latents, 3 sigmas, 1 prompts"),
    ],
)
def test_what_no_score_is_of(reward: LatentReward, latents: Tensor, sigma, prompts, message: str) -> None:
    for scored in (reward, RewardEnsemble([reward])):
        with pytest.raises(PrflError, match=f"(?s){message}"):
            scored(latents, sigma, prompts)


def test_the_condition_of_another_batch(reward: LatentReward, latents: Tensor) -> None:
    with pytest.raises(PrflError, match="2 latents, 1 sigmas, 3 prompts"):
        reward(latents, torch.tensor(0.5), reward.backbone.condition(["a", "b", "c"]))


def test_latents_of_another_model(reward: LatentReward, latents: Tensor) -> None:
    facts = reward.backbone.facts
    for wrong, message in (
        (latents[:, :3], "has 3 channels, and the latents of .* have 4"),
        (latents[..., :3], "width of 3 .* patches of 2"),
        (latents[0, 0], "are no latents"),
        (latents.long(), "torch.int64 are no latents"),
    ):
        with pytest.raises(PrflError, match=message):
            check_latents(wrong, facts)
    with pytest.raises(PrflError, match="has 3 channels"):
        reward.score(latents[:, :3], 0.5, PROMPTS)


def test_print_says_what_a_reward_is(reward: LatentReward) -> None:
    text = str(reward)
    assert "motion, look" in text and "behind block 1 of 0 to 2, frozen" in text and "a logit" in text
    assert f"{reward.backbone.facts.model_id} (family wan)" in text and "does not say" in text
    clip = RewardCard(frames=(5, 17), height=(16, 16), width=(32, 32), fps=(8.0, 8.0))
    calibrated = Normalisation({"motion": 0.3, "look": 0.0}, {"motion": 2.0, "look": 1.0})
    adapter = RewardAdapter(rank=2, alpha=4.0, targets=("to_q",))
    head = RewardHead(reward.backbone.facts.widths[0], ["motion", "look"], blocks=2, inner=16, heads=2, hidden=16)
    text = repr(LatentReward(head, reward.backbone, [0, 2], adapter, calibrated, clip))
    assert "behind blocks 0, 2 of 0 to 2, with an own adapter of rank 2" in text
    assert "one standard deviation" in text and "5 to 17 frames of 32 x 16 pixels at 8 fps" in text
