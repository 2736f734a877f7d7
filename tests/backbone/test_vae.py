"""Encoding, and decoding without the clamp."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prfl.backbone.network import park_vae
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.vae import decode, decode_raw, latent_statistics
from prfl.estimate.live_tensors import LiveBytes, SavedBytes
from prfl.utils.errors import PrflError
from tests.models import with_own_vae


def test_round_trip_shapes_and_normalisation(tiny_backbone: WanBackbone) -> None:
    pixels = torch.rand(2, 3, 17, 16, 24) * 2 - 1
    latents = tiny_backbone.encode(pixels)
    assert latents.shape == (2, *tiny_backbone.latent_shape(17, 16, 24))
    mean, std = latent_statistics(tiny_backbone.vae, latents)
    raw = tiny_backbone.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents * std + mean, raw)
    assert tiny_backbone.decode(latents).shape == pixels.shape


def test_decode_is_the_vaes_own_before_its_clamp(tiny_backbone: WanBackbone) -> None:
    latents = torch.randn(2, 4, 3, 4, 4) * 3
    with_own_vae(tiny_backbone).vae.decoder.conv_out.weight.mul_(30)  # so that a part saturates
    pixels = tiny_backbone.decode(latents)
    mean, std = latent_statistics(tiny_backbone.vae, latents)
    expected = tiny_backbone.vae.decode(latents * std + mean, return_dict=False)[0]
    assert 0.01 < (pixels.abs() > 1).float().mean() < 0.99
    torch.testing.assert_close(pixels.clamp(-1, 1), expected, rtol=0, atol=1e-5)


def test_decode_has_a_gradient_where_the_clamped_one_has_none(tiny_backbone: WanBackbone) -> None:
    latents = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    with_own_vae(tiny_backbone).vae.decoder.conv_out.bias.fill_(20.0)
    clamped = tiny_backbone.vae.decode(latents, return_dict=False)[0]
    assert torch.autograd.grad(clamped.sum(), latents)[0].abs().max() == 0
    pixels = tiny_backbone.decode(latents)
    gradient = torch.autograd.grad(pixels[:, :, -1].sum(), latents)[0]
    assert pixels.min() > 1 and gradient.abs().min() > 0  # causal in time: the last frame sees every latent frame


@pytest.mark.parametrize("gradient_from", [0, 2])
def test_a_checkpointed_decoder_gives_the_same_gradient_and_keeps_less(
    tiny_backbone: WanBackbone, gradient_from: int
) -> None:
    vae = with_own_vae(tiny_backbone).vae.double()
    latents = torch.randn(2, 4, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    found, kept = [], []
    for checkpointed in (False, True):
        with SavedBytes() as saved:
            pixels = decode(vae, latents, gradient_from, checkpointed)
            kept.append(saved.live)
        # Squared, and the frames weighed apart: a feature that came from a wrong frame would show.
        weight = torch.arange(1.0, pixels.shape[2] + 1)[:, None, None]
        found.append([pixels.detach(), torch.autograd.grad((weight * pixels**2).sum(), latents)[0]])
    for plain, own in zip(*found, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-12)
    assert found[1][1][:, :, gradient_from:].abs().amin() > 0
    assert kept[1] < 0.4 * kept[0]


def test_many_frames_are_checkpointed_in_groups(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pixels and gradient as frame by frame; features are kept between groups only."""
    vae, gradients, kept = with_own_vae(tiny_backbone).vae.double(), [], []
    for few in (99, 4):
        monkeypatch.setattr("prfl.backbone.wan.vae.FEW", few)
        latents = torch.randn(1, 4, 10, 2, 2, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        with SavedBytes() as saved:
            pixels = decode(vae, latents, 1, checkpointed=True)
            kept.append(saved.live)
            gradients.append(torch.autograd.grad(pixels.square().sum(), latents)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0][:, :, 1:].abs().amax() > 0 and not gradients[0][:, :, 0].any()
    assert kept[1] < 0.55 * kept[0]


def test_the_decoder_is_checkpointed_with_the_blocks(tiny_backbone: WanBackbone) -> None:
    kept = {}
    for mode in ("none", "full"):
        tiny_backbone.running.checkpointing = mode
        with SavedBytes() as saved:
            pixels = tiny_backbone.decode(torch.randn(1, 4, 3, 2, 2, requires_grad=True))
            kept[mode] = saved.live
        del pixels
    assert kept["full"] < 0.5 * kept["none"]


def test_encode_refuses_sizes_that_do_not_fit(tiny_backbone: WanBackbone) -> None:
    with pytest.raises(PrflError, match="take 1 or 5"):
        tiny_backbone.encode(torch.zeros(1, 3, 4, 16, 16))


def test_the_network_never_calls_the_vae(tiny_backbone: WanBackbone) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the VAE was called")

    for module in with_own_vae(tiny_backbone).vae.modules():
        module.register_forward_pre_hook(refuse)
    condition = tiny_backbone.condition(["a red circle", ""])
    latents = torch.randn(2, *tiny_backbone.latent_shape(17, 16, 16), requires_grad=True)
    tiny_backbone.velocity(latents, torch.tensor(0.5), condition).sum().backward()
    tiny_backbone.features(latents, torch.tensor(0.5), condition, [1])[0].sum().backward()
    with pytest.raises(AssertionError, match="the VAE was called"):
        tiny_backbone.decode(latents)


def test_a_parked_vae_comes_back_when_it_is_used(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    monkeypatch.setattr(tiny_backbone.vae, "to", lambda place: (moved.append(str(place)), tiny_backbone.vae)[1])
    park_vae(tiny_backbone)
    tiny_backbone.decode(torch.zeros(1, 4, 1, 2, 2))
    tiny_backbone.encode(torch.zeros(1, 3, 1, 8, 8))
    assert moved == ["cpu", str(tiny_backbone.facts.device), str(tiny_backbone.facts.device)]
    tiny_backbone.facts = replace(tiny_backbone.facts, device=torch.device("cuda"))
    tiny_backbone.decode(torch.zeros(1, 4, 1, 2, 2))
    assert moved[-1] == "cuda", "to where the transformer is"


def test_without_a_gradient_it_takes_no_more_than_diffusers_own(tiny_backbone: WanBackbone) -> None:
    """The features of a frame are gone when the next one has its own: they are most of a large decoder's peak."""
    raw = torch.randn(1, tiny_backbone.facts.latent_channels, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    peaks = []
    for decoded in (tiny_backbone.vae._decode, lambda raw: decode_raw(tiny_backbone.vae, raw)):
        with torch.no_grad(), LiveBytes() as counted:
            decoded(raw)
        peaks.append(counted.peak)
    assert peaks[1] <= 1.02 * peaks[0]
