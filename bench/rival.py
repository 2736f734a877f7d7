"""The rival: PRFL's and VADER's step as people write them today, in one joint autograd graph.

diffusers' transformer and VAE, peft's adapters, gradient checkpointing switched on, and torch; nothing of prfl.  The
start of the chain and what turns features or pixels into a loss are given, so that both sides have the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor


def add_lora(transformer: WanTransformer3DModel, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freezes the transformer and puts an adapter on it, in float32."""
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    cast_training_params(transformer, dtype=torch.float32)


def velocity(transformer: WanTransformer3DModel, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    timestep = (1000 * sigma).expand(len(latents))
    output = transformer(latents.to(transformer.dtype), timestep, text.to(transformer.dtype), return_dict=False)[0]
    return output.to(latents.dtype)


def chain(
    transformer: WanTransformer3DModel, latents: Tensor, sigmas: Tensor, text: Tensor, last: int, trained: int
) -> Tensor:
    """Euler steps from noise up to node ``last``, the last ``trained`` of them recorded by autograd."""
    for i in range(last):
        with torch.set_grad_enabled(i >= last - trained):
            latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(transformer, latents, sigmas[i], text)
    return latents


def features(model: WanTransformer3DModel, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Hidden states after the model's last block."""
    outputs: list[Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    velocity(model, latents, sigma, text)
    hook.remove()
    return outputs[0]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode as diffusers does, without its clamp, which takes the gradient off every saturated pixel."""
    shape = 1, -1, 1, 1, 1
    mean, std = (
        torch.tensor(each).view(shape).to(latents) for each in (vae.config.latents_mean, vae.config.latents_std)
    )
    hidden = vae.post_quant_conv((latents * std + mean).to(vae.dtype))
    vae.clear_cache()
    frames = []
    for i in range(hidden.shape[2]):
        vae._conv_idx = [0]
        frames.append(vae.decoder(hidden[:, :, i : i + 1], vae._feat_map, vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def prfl_step(
    policy: WanTransformer3DModel, reward: WanTransformer3DModel, loss_of: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor, sigmas: Tensor, text: Tensor, step: int,
) -> Tensor:  # fmt: skip
    """Gradients of ``loss_of(features, sigma)`` at the latents behind one step of the chain; gives the loss.

    reward: a second model, of as many blocks as it reads.  sigmas: of the chain, noise first.
    """
    latents = chain(policy, noise, sigmas, text, step + 1, trained=1)
    loss = loss_of(features(reward, latents, sigmas[step + 1], text), sigmas[step + 1])
    loss.backward()
    return loss.detach()


def vader_step(
    policy: WanTransformer3DModel, vae: AutoencoderKLWan, loss_of: Callable[[Tensor], Tensor],
    noise: Tensor, sigmas: Tensor, text: Tensor, last_steps: int, frames: int,
) -> Tensor:  # fmt: skip
    """Gradients of ``loss_of(pixels)`` of the first latent frames of the finished video; gives the loss."""
    latents = chain(policy, noise, sigmas, text, len(sigmas) - 1, trained=last_steps)
    loss = loss_of(decode(vae, latents[:, :, :frames]))
    loss.backward()
    return loss.detach()
