"""What families share whose network is a UNet over the frames' pictures: its blocks' tokens, adapters, the frames."""

from __future__ import annotations

from typing import TypeVar

from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

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
