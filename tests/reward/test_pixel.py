from __future__ import annotations

import pytest
import torch

from prfl.backbone.wan.text import text_condition
from prfl.reward import LatentReward, Normalisation, PixelNetwork, PixelReward
from prfl.utils.errors import PrflError


def condition(batch=2, width=16, tokens=4):
    embeds = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(2))
    lengths = torch.arange(2, 2 + batch)
    embeds[torch.arange(tokens) >= lengths[:, None]] = 0
    return text_condition(embeds, lengths)


def clip(batch=2, frames=5, height=32, width=32):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def reward():
    torch.manual_seed(0)
    return PixelReward(PixelNetwork(16, ["motion", "look"]))


def test_size(reward):
    assert 100_000 < sum(parameter.numel() for parameter in reward.parameters().values()) < 300_000
    assert (reward.space, reward.noise_aware, reward.differentiable) == ("pixel", False, True)


@pytest.mark.parametrize("frames, height, width", [(1, 32, 32), (3, 16, 48), (17, 64, 64)])
def test_any_frames_and_resolution(reward, frames, height, width):
    scores = reward(clip(2, frames, height, width), condition())
    assert scores.keys() == {"motion", "look"} and scores["look"].shape == (2,)


def test_gradient_in_the_pixels_against_finite_differences():
    torch.manual_seed(0)
    reward = PixelReward(PixelNetwork(6, ["motion"], size=8, hidden=4, inner=8))
    reward.network.double()
    pixels = clip(1, 2, 10, 8).double().requires_grad_()  # resized, so that the resize is differentiated as well
    text = condition(1, 6)
    assert torch.autograd.gradcheck(lambda p: reward(p, text)["motion"], (pixels,), fast_mode=True)


def test_pixels_beyond_the_range_still_have_a_gradient(reward):
    pixels = (3 * torch.ones(1, 3, 3, 32, 32)).requires_grad_()
    reward(pixels, condition(1))["motion"].sum().backward()
    assert pixels.grad.abs().max() > 0, "no clamp on the way"


def test_it_reads_motion_the_prompt_and_the_times(reward):
    text, pixels = condition(), clip()
    score = reward(pixels, text)["motion"]
    for other in (reward(pixels.flip(2), text), reward(pixels, text[[1, 0]])):
        assert (other["motion"] - score).abs().max() > 1e-4
    uneven = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0])
    assert (reward(pixels, text, uneven)["motion"] - score).abs().max() > 1e-5
    assert torch.equal(reward(pixels, text, torch.linspace(0, 1, 5))["motion"], score)


def test_padding_of_the_prompt_does_not_count(reward):
    short = condition()
    padded = text_condition(
        torch.nn.functional.pad(short.tensors["prompt_embeds"], (0, 0, 0, 5)), short.tensors["lengths"]
    )
    torch.testing.assert_close(reward(clip(), padded)["look"], reward(clip(), short)["look"])


def test_samples_do_not_mix(reward):
    both = reward(clip(), condition())["look"]
    torch.testing.assert_close(reward(clip()[1:], condition()[1:])["look"], both[1:])


def test_round_trip(reward, tmp_path):
    reward.calibrate({"motion": torch.tensor([0.0, 2.0]), "look": torch.tensor([1.0, 5.0])})
    reward.save_pretrained(tmp_path / "pixel")
    again = PixelReward.from_pretrained(tmp_path / "pixel")
    assert torch.equal(again(clip(), condition())["look"], reward(clip(), condition())["look"])
    assert again.normalisation == reward.normalisation != Normalisation.none(reward.dimensions)
    assert not any(parameter.requires_grad for parameter in again.parameters().values())


def test_a_pixel_reward_is_no_latent_reward(reward, tmp_path, tiny_backbone):
    reward.save_pretrained(tmp_path / "pixel")
    with pytest.raises(PrflError, match="prfl-pixel-reward"):
        LatentReward.from_pretrained(tmp_path / "pixel", tiny_backbone)


def test_another_text_encoder_does_not_fit(reward):
    with pytest.raises(PrflError, match="width 16, got 12"):
        reward(clip(), condition(width=12))
