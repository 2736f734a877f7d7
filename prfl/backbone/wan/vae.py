"""Encoding and decoding with a diffusers ``AutoencoderKLWan``, without the clamp that kills gradients.

``AutoencoderKLWan.decode`` clamps pixels to [-1, 1], where the gradient of every saturated pixel is zero; a reward
or a training loss must go around it.  The decoder is causal in time and keeps a cache of past features, so latent
frames are decoded in order, one at a time.  diffusers declares no checkpoints for it; ours are between these frames,
and between groups of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock, unpatchify
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FEW = 4  # latent frames with gradient, up to which the features of each are kept


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
    checkpointed: each later frame, or group of some (``frames_together``), keeps the features that its causal layers
    take over from the frame before, and is decoded again in the backward pass.
    """
    latents = latents.to(vae.dtype)
    mean, std = latent_statistics(vae, latents)
    return decode_raw(vae, latents * std + mean, gradient_from, checkpointed)


def decode_raw(vae: AutoencoderKLWan, raw: Tensor, gradient_from: int = 0, checkpointed: bool = False) -> Tensor:
    """Raw (not normalised) latents to unclamped pixels: ``AutoencoderKLWan._decode`` less its clamp."""
    hidden = vae.post_quant_conv(raw)
    vae.clear_cache()
    chunks, features = [], list(vae._feat_map)
    with_gradient = hidden.shape[2] - gradient_from if torch.is_grad_enabled() else 0
    for frame in range(hidden.shape[2] - with_gradient):  # in place: features go layer by layer as the next ones come
        chunks.append(_decode_frame(vae.decoder, frame == 0, hidden[:, :, frame : frame + 1].detach(), features))

    group = frames_together(with_gradient) if checkpointed else 1
    for frame in range(hidden.shape[2] - with_gradient, hidden.shape[2], group):
        run = partial(_decode_frames, vae.decoder, frame == 0, checkpointed and group > 1)
        read = hidden[:, :, frame : frame + group]
        pixels, features = _again(run, read, *features) if checkpointed else run(read, *features)
        chunks.append(pixels)
    pixels = torch.cat(chunks, dim=2)
    return unpatchify(pixels, patch_size=vae.config.patch_size) if vae.config.patch_size is not None else pixels


def frames_together(count: int) -> int:
    """Of so many latent frames with gradient, how many make a group: about the square root of many, else 1.

    The features of a frame are as large as hundreds of pictures (3.3 GiB at 480 x 832): of a group only the last are
    kept, and those within it come anew in the backward pass, for one forward pass more.
    """
    return round(math.sqrt(count)) if count > FEW else 1


def _again(run: Callable[..., Any], *inputs: Any) -> Any:
    return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)


def _decode_frames(
    decoder: nn.Module, first: bool, checkpointed: bool, chunk: Tensor, *features: Any
) -> tuple[Tensor, list[Any]]:
    """Pixels of some latent frames, and the features of the last; as arguments and results, as a checkpoint needs them.

    checkpointed: each frame by itself, too, and within it each block.
    """
    decoded, kept = [], list(features)
    for frame in range(chunk.shape[2]):
        run = partial(_decode_by_block, decoder, first and frame == 0)
        read = chunk[:, :, frame : frame + 1]
        if checkpointed:
            pixels, kept = _again(run, read, *kept)
        else:
            pixels = _decode_frame(decoder, first and frame == 0, read, kept)
        decoded.append(pixels)
    return torch.cat(decoded, dim=2), kept


def _decode_by_block(decoder: nn.Module, first: bool, chunk: Tensor, *features: Any) -> tuple[Tensor, list[Any]]:
    """Pixels and features of one latent frame, of which each block of the decoder keeps its input alone."""
    kept = list(features)
    blocks = [module for module in decoder.up_blocks.modules() if type(module) is WanResidualBlock]
    for block in blocks:
        block.__class__ = BlockAgain
    try:
        return _decode_frame(decoder, first, chunk, kept), kept
    finally:
        for block in blocks:
            block.__class__ = WanResidualBlock


class BlockAgain(WanResidualBlock):
    """A block of the decoder that is computed again in the backward pass; parameters and names stay."""

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        at = feat_idx[0]

        def run(x: Tensor, *features: Any) -> tuple[Tensor, ...]:
            mine = dict(enumerate(features, start=at))
            return WanResidualBlock.forward(self, x, mine, [at]), *mine.values()

        x, feat_cache[at], feat_cache[at + 1] = _again(run, x, feat_cache[at], feat_cache[at + 1])
        feat_idx[0] = at + 2
        return x


def _decode_frame(decoder: nn.Module, first: bool, chunk: Tensor, features: list[Any]) -> Tensor:
    """Pixels of one latent frame.  features: of the frame before, and then of this one: a tensor, nothing yet or a mark
    for each layer, which the decoder itself writes there."""
    return decoder(chunk, feat_cache=features, feat_idx=[0], **({"first_chunk": True} if first else {}))
