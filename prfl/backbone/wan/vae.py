"""Encoding and decoding with a diffusers ``AutoencoderKLWan``, without the clamp that kills gradients.

``AutoencoderKLWan.decode`` clamps pixels to [-1, 1], where the gradient of every saturated pixel is zero; a reward
or a training loss must go around it.  The decoder is causal in time and keeps a cache of past features, so latent
frames are decoded in order, one at a time.  diffusers declares no checkpoints for it; ours are between these frames.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def channels_last(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Lay the convolutions' weights out channels last, in place: on a CPU both directions take half the time."""
    formats = {torch.nn.Conv3d: torch.channels_last_3d, torch.nn.Conv2d: torch.channels_last}
    for module in vae.modules():
        for kind, memory_format in formats.items():
            if isinstance(module, kind):
                module.weight.data = module.weight.data.to(memory_format=memory_format)
    return vae


def latent_statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's raw latents, (1, channels, 1, 1, 1), in the dtype of ``like``."""
    mean, std = (
        torch.tensor(value).view(1, -1, 1, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean.to(like), std.to(like)


def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels (batch, 3, frames, height, width) in [-1, 1] to normalised latents (the posterior's mean)."""
    raw = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    mean, std = latent_statistics(vae, raw)
    return (raw - mean) / std


def decode(vae: AutoencoderKLWan, latents: Tensor, gradient_from: int = 0, checkpointed: bool = False) -> Tensor:
    """Normalised latents (batch, channels, frames, height, width) to *unclamped* pixels, differentiable.

    gradient_from: latent frames before this one get no gradient, and nothing is kept of their decoding.
    checkpointed: each later frame keeps the features that its causal layers take over from the frame before, and is
    decoded again in the backward pass.
    """
    latents = latents.to(vae.dtype)
    mean, std = latent_statistics(vae, latents)
    return decode_raw(vae, latents * std + mean, gradient_from, checkpointed)


def decode_raw(vae: AutoencoderKLWan, raw: Tensor, gradient_from: int = 0, checkpointed: bool = False) -> Tensor:
    """Raw (not normalised) latents to unclamped pixels: ``AutoencoderKLWan._decode`` less its clamp."""
    hidden = vae.post_quant_conv(raw)
    vae.clear_cache()
    chunks, features = [], list(vae._feat_map)
    for frame in range(hidden.shape[2]):
        chunk = (hidden if frame >= gradient_from else hidden.detach())[:, :, frame : frame + 1]
        run = partial(_decode_frame, vae.decoder, frame == 0)
        if checkpointed and frame >= gradient_from and torch.is_grad_enabled():
            pixels, features = checkpoint(
                partial(_with_features, run), chunk, *features, use_reentrant=False, preserve_rng_state=False
            )
        else:  # in place: the features of a frame are gone layer by layer as the next one's come
            pixels = run(chunk, features)
        chunks.append(pixels)
    pixels = torch.cat(chunks, dim=2)
    return unpatchify(pixels, patch_size=vae.config.patch_size) if vae.config.patch_size is not None else pixels


def _decode_frame(decoder: nn.Module, first: bool, chunk: Tensor, features: list[Any]) -> Tensor:
    """Pixels of one latent frame.  features: of the frame before, and then of this one: a tensor, nothing yet or a mark
    for each layer, which the decoder itself writes there."""
    return decoder(chunk, feat_cache=features, feat_idx=[0], **({"first_chunk": True} if first else {}))


def _with_features(
    run: Callable[[Tensor, list[Any]], Tensor], chunk: Tensor, *features: Any
) -> tuple[Tensor, list[Any]]:
    """The features as arguments and results, as a checkpoint needs them."""
    kept = list(features)
    return run(chunk, kept), kept
