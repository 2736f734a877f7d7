"""What families share whose network is a UNet over the frames' pictures: its blocks' tokens, adapters, the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from prfl.backbone.base import SIGMA_CONVENTION, Facts
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.source import Source

Network = TypeVar("Network", bound=nn.Module)
LISTS = ("down_blocks", "mid_block", "up_blocks")
"""The names of its lists of blocks; the middle is one block."""
PREPARED = """
# diffusers' class of the UNet lacks the methods that load a LoRA
from diffusers.loaders import PeftAdapterMixin

unet = type(pipeline.unet)
pipeline.unet.__class__ = type(unet.__name__, (PeftAdapterMixin, unet), {})"""


def with_adapters(unet: Network) -> Network:
    """The same network with diffusers' methods for adapters, which its class has not; names and files stay the same."""
    plain = type(unet)
    if not issubclass(plain, PeftAdapterMixin):
        unet.__class__ = type(plain.__name__, (PeftAdapterMixin, plain), {})
    return unet


def unet_facts(
    source: Source, unet: Any, vae: Any, settings: Sequence[str], *, latent_channels: int, **more: Any
) -> Facts:
    """The facts of such a model.  settings: names in diffusers' configs (``settings_fingerprint``).  more: its own."""
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    widths, strides = block_shapes(unet.config.block_out_channels)
    identity = {
        "model_id": source.model_id,
        "revision": source.revision,
        "num_blocks": len(widths),
        "width": list(widths),
        "latent_channels": latent_channels,
        "patch_size": [1, 1, 1],
        "spatial_factor": spatial,
        "temporal_factor": 1,
        "scaling_factor": vae.config.scaling_factor,
        "sigma_convention": SIGMA_CONVENTION,
        "unet_fingerprint": fingerprint(unet, most=SAMPLED),
        "vae_fingerprint": fingerprint(vae),
    }
    return Facts(
        model_id=source.model_id,
        revision=source.revision,
        identity=identity,
        settings=settings_fingerprint(unet.config, vae.config, names=settings),
        blocks={"unet": LISTS},
        widths=widths,
        strides=strides,
        latent_channels=latent_channels,
        patch=(1, 1, 1),
        spatial_factor=spatial,
        temporal_factor=1,
        device=unet.conv_in.weight.device,
        dtype=unet.conv_in.weight.dtype,
        vae_dtype=vae.dtype,
        variance_preserving=True,
        **more,
    )


def block_shapes(channels: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths, and latents that a token is wide, behind each block on the way down, in the middle, and up again.

    All blocks but the last on either way change the size at their end.
    """
    deepest = 2 ** (len(channels) - 1)
    down = [min(2 ** (level + 1), deepest) for level in range(len(channels))]
    up = [max(deepest // 2 ** (level + 1), 1) for level in range(len(channels))]
    return (*channels, channels[-1], *reversed(channels)), (*down, deepest, *up)


def tokens_of_pictures(batch: int, hidden: Tensor) -> Tensor:
    """Pictures (batch frames, width, h, w), each block's of its own size, to tokens (batch, frames h w, width)."""
    return hidden.unflatten(0, (batch, -1)).movedim(2, -1).flatten(1, 3)


def pictures(video: Tensor) -> Tensor:
    """(batch, channels, frames, height, width) to one picture a frame, (batch frames, channels, height, width)."""
    return video.transpose(1, 2).flatten(0, 1)


def videos(each: Tensor, batch: int) -> Tensor:
    """Back again."""
    return each.unflatten(0, (batch, -1)).transpose(1, 2)
