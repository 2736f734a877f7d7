"""Wan 2.2 TI2V-5B, text to video: a VAE with residual stages over patches, timesteps expanded to the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

from prfl.backbone import load_backbone
from prfl.backbone.frames import pixel_frames
from prfl.backbone.wan.model import WanBackbone
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import euler
from prfl.rollout.trajectory import rollout
from tests.tiny import CHANNELS, tiny_text_encoder, tiny_tokenizer, tiny_transformer

SHAPE = (CHANNELS, 3, 4, 4)  # 9 frames of 32 x 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-ti2v"
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 2], num_res_blocks=1,
        temperal_downsample=[True, True], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 0.8, 1.0], scale_factor_spatial=8,
        scale_factor_temporal=4,
    )  # fmt: skip
    WanPipeline(
        tokenizer=tiny_tokenizer(), text_encoder=tiny_text_encoder(), vae=vae, transformer=tiny_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), expand_timesteps=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def model(folder: Path) -> WanBackbone:
    backbone = load_backbone(folder)
    assert isinstance(backbone, WanBackbone)
    return backbone


def test_the_chain_is_the_pipelines_own(model: WanBackbone, folder: Path) -> None:
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.expand_timesteps
    start = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    how = dict(height=32, width=32, num_frames=9, num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    theirs = pipe("a red circle", **how, latents=start.clone()).frames
    condition, empty = model.condition(["a red circle"]), model.condition([""])
    network = guided_network(model.velocity, condition, empty, scale=3.0, gradient="both")
    ours = rollout(network, start, euler(pipe.scheduler.sigmas)).at(3)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_encoding_and_decoding(model: WanBackbone, checkpointing: str) -> None:
    """As diffusers, less its clamp; a part as the whole, with the gradient of the frames that are shown."""
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    pixels = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, std = model.encode(pixels), torch.tensor([0.5, 1.5, 0.8, 1.0]).reshape(1, -1, 1, 1, 1)
    mean = torch.tensor([0.1, -0.2, 0.3, 0.0]).reshape(1, -1, 1, 1, 1)
    assert latents.shape == (1, *SHAPE) and model.latent_shape(9, 32, 32) == SHAPE
    torch.testing.assert_close(latents * std + mean, model.vae.encode(pixels).latent_dist.mode())
    leaf = latents.detach().requires_grad_()
    whole = model.decode(leaf)
    assert whole.shape == pixels.shape
    torch.testing.assert_close(whole.clamp(-1, 1), model.vae.decode(latents * std + mean).sample)
    (expected,) = torch.autograd.grad(whole[:, :, pixel_frames([1], 4)].sin().sum(), leaf)
    shown = model.decode(leaf, [1])
    torch.testing.assert_close(shown, whole[:, :, pixel_frames([1], 4)])
    (gradient,) = torch.autograd.grad(shown.sin().sum(), leaf)
    torch.testing.assert_close(gradient[:, :, 1], expected[:, :, 1])
    assert gradient[:, :, 1].any() and not gradient[:, :, [0, 2]].any()


def test_the_kernels_run_it_too(model: WanBackbone) -> None:
    latents, condition = torch.randn(1, *SHAPE), model.condition(["a red circle"])
    plain = model.velocity(latents, torch.tensor(0.5), condition)
    model.use_kernels()
    torch.testing.assert_close(model.velocity(latents, torch.tensor(0.5), condition), plain, rtol=0, atol=1e-5)
