"""Encoding and decoding with a diffusers ``AutoencoderKLCogVideoX``: in groups of frames, as it was trained.

The decoder takes the latent frames in pairs, the first pair with one more where their number is odd.  A group takes
over causal features from the one before it, and its group norms run over all of its frames: so groups are decoded in
order, and a group whole.  Nothing is clamped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from prfl.backbone.frames import detach_others, pixel_frames


def frame_groups(count: int, together: int) -> list[tuple[int, int]]:
    """(first, behind the last) of the frames that are decoded together, of so many."""
    odd = count % together
    ends = [min(count, together * (number + 1) + odd) for number in range(max(1, count // together))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def encode(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> Tensor:
    """Pixels (batch, 3, frames, height, width) in [-1, 1] to normalised latents (the posterior's mean)."""
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor


def decode(
    vae: AutoencoderKLCogVideoX, latents: Tensor, shown: Sequence[int] | None = None, checkpointed: bool = False
) -> Tensor:
    """Normalised latents to the pixels of the latent frames that are shown (None: of all), differentiable in those.

    Groups behind the last shown frame are not decoded; those before the first are, and nothing is kept of it.
    checkpointed: the decoder's blocks are computed again in the backward pass, as diffusers has it.
    """
    vae.enable_gradient_checkpointing() if checkpointed else vae.disable_gradient_checkpointing()
    count = latents.shape[2]
    wanted = range(count) if shown is None else shown
    raw = (latents if shown is None else detach_others(latents, shown)).to(vae.dtype) / vae.config.scaling_factor

    features, parts, frames = None, [], list[int]()
    for first, end in frame_groups(count, vae.num_latent_frames_batch_size):
        before = end <= wanted[0]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not before):
            part = raw[:, :, first:end]
            part = part if vae.post_quant_conv is None else vae.post_quant_conv(part)
            pixels, features = vae.decoder(part, conv_cache=features)
        if not before:
            parts.append(pixels)
            frames += pixel_frames(range(first, end), vae.config.temporal_compression_ratio)
        if end > wanted[-1]:
            break
    decoded = torch.cat(parts, dim=2)
    if shown is None:
        return decoded
    return decoded[:, :, [frames.index(frame) for frame in pixel_frames(shown, vae.config.temporal_compression_ratio)]]
