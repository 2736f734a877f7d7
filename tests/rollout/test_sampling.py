"""Samples are a function of (seed, prompt, sample index), and the noise of base and policy is the same."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import UniPCMultistepScheduler

from prfl.backbone import LoraSpec
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.sampling import SamplingSettings, decode_all, jobs, sample, start_noise

PROMPTS = ["a red circle moves left", "a blue square moves up"]
SETTINGS = SamplingSettings(frames=5, height=8, width=8, steps=2, batch=3)


def test_a_sample_does_not_depend_on_batch_order_or_company(tiny_backbone):
    prompts, indices = jobs(PROMPTS, 2)
    together = sample(tiny_backbone, prompts, indices, SETTINGS)
    assert together.shape == (4, *tiny_backbone.latent_shape(5, 8, 8))
    alone = sample(tiny_backbone, prompts[3:], indices[3:], SETTINGS)
    torch.testing.assert_close(alone, together[3:], rtol=1e-4, atol=1e-5)
    reversed_ = sample(tiny_backbone, prompts[::-1], indices[::-1], replace(SETTINGS, batch=2))
    torch.testing.assert_close(reversed_.flip(0), together, rtol=1e-4, atol=1e-5)


def test_noise_differs_between_samples_prompts_and_seeds():
    draws = [start_noise((2, 2), seed, [prompt], [index]) for seed in (0, 1) for prompt in PROMPTS for index in (0, 1)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 8


def test_base_and_policy_are_paired(tiny_backbone):
    """A fresh LoRA changes nothing, so its samples equal the base's; a changed one starts from the same noise."""
    tiny_backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2, targets=["to_q"]))
    prompts, indices = jobs(PROMPTS, 1)
    base = sample(tiny_backbone, prompts, indices, SETTINGS)
    torch.testing.assert_close(sample(tiny_backbone, prompts, indices, SETTINGS, adapter="policy"), base)
    with torch.no_grad():
        for parameter in tiny_backbone.parameters("policy").values():
            parameter.add_(1.0)
    policy = sample(tiny_backbone, prompts, indices, SETTINGS, adapter="policy")
    assert (policy - base).abs().max() > 1e-3
    torch.testing.assert_close(sample(tiny_backbone, prompts, indices, SETTINGS), base)
    assert tiny_backbone.active_adapter is None


def test_another_solver_is_sampled_by_its_own_states(tiny_backbone):
    """UniPC's samples are those of diffusers' scheduler, and not Euler's."""
    settings = replace(SETTINGS, steps=4, shift=3.0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=chain_sigmas(4, 3.0)[:-1].numpy())
    x = start_noise(tiny_backbone.latent_shape(5, 8, 8), 0, PROMPTS[:1], [0])
    with torch.no_grad(), tiny_backbone.adapter(None):
        for sigma, timestep in zip(chain_sigmas(4, 3.0)[:-1].float(), scheduler.timesteps, strict=True):
            velocity = tiny_backbone.velocity(x, sigma, tiny_backbone.condition(PROMPTS[:1]))
            x = scheduler.step(velocity, timestep, x).prev_sample
    samples = sample(tiny_backbone, PROMPTS[:1], [0], replace(settings, solver="unipc"))
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)
    assert (samples - sample(tiny_backbone, PROMPTS[:1], [0], settings)).abs().max() > 1e-2


def test_guidance_of_one_is_none_and_of_three_is_another(tiny_backbone):
    plain = sample(tiny_backbone, PROMPTS[:1], [0], SETTINGS)
    assert (sample(tiny_backbone, PROMPTS[:1], [0], replace(SETTINGS, guidance_scale=3.0)) - plain).abs().max() > 1e-4


def test_decoded_pixels_are_clamped_and_the_same_in_any_batch(tiny_backbone):
    latents = 20 * torch.randn(3, *tiny_backbone.latent_shape(5, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = decode_all(tiny_backbone, latents, batch=2)
    assert pixels.shape == (3, 3, 5, 8, 8)
    assert pixels.abs().max() <= 1
    torch.testing.assert_close(decode_all(tiny_backbone, latents[2:], batch=1), pixels[2:], rtol=1e-4, atol=1e-5)
