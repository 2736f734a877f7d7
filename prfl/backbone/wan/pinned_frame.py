"""Wan 2.2 TI2V-5B, image to video: the first frame stands in the latents, and its tokens are at time 0.

The network sees the picture's latents in the first frame, whatever the state has there.  The velocity there is that of
the straight path to them, (x - frame) / sigma: so a chain from noise, or from a noised clip, ends at the picture, and
flow matching on a clip has no loss in a frame that is given.  Elsewhere it is the network's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor
from transformers import UMT5EncoderModel

from prfl.backbone.condition import Condition, TensorSpec
from prfl.backbone.family import Family
from prfl.backbone.first_frame import FRAME, FirstFrameBackbone, check_size
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.facts import read_facts
from prfl.backbone.wan.family import WAN
from prfl.backbone.wan.loading import check_vae, flow_schedule
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import WanText
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

LEAST = 1e-6  # sigma by which a distance to the picture is divided, where a chain has ended


class PinnedFrameBackbone(FirstFrameBackbone, WanBackbone):
    """Wan 2.2 TI2V-5B for prompts with first frames.  Made by ``load_backbone``; every base weight is frozen."""

    def frame_tensors(self, picture: Tensor, clip: VideoSize) -> dict[str, Tensor]:
        self.latent_shape(clip.frames, clip.height, clip.width)
        return {FRAME: self.encode(picture[None, :, None])}

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """The network's v = noise - x0 behind the first frame, and the straight path to the picture in it."""
        frame = self._frame(latents, condition)
        free = super().velocity(self._pinned(latents, frame), sigma, condition)
        level = sigma.to(latents.device).expand(len(latents)).reshape(-1, 1, 1, 1, 1).clamp(min=LEAST)
        straight = (latents[:, :, :1] - frame) / level
        return torch.cat([straight.to(free.dtype), free[:, :, 1:]], dim=2)

    def features(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        return super().features(self._pinned(latents, self._frame(latents, condition)), sigma, condition, blocks)

    def timesteps(self, sigma: Tensor, latents: Tensor) -> Tensor:
        """One for each token: 0 in the first frame."""
        of_sample = super().timesteps(sigma, latents)
        frames, *grid = [size // patch for size, patch in zip(latents.shape[2:], self.facts.patch, strict=True)]
        each = of_sample[:, None].repeat(1, frames)
        each[:, 0] = 0
        return each.repeat_interleave(grid[0] * grid[1], dim=1)

    def _frame(self, latents: Tensor, condition: Condition) -> Tensor:
        """The picture's latents.  Raises PrflError for those of another size."""
        frame = condition.tensors[FRAME].to(latents)
        check_size(frame, latents, 2)
        return frame

    def _pinned(self, latents: Tensor, frame: Tensor) -> Tensor:
        return torch.cat([frame, latents[:, :, 1:]], dim=2)


def pins(index: Mapping[str, Any]) -> bool:
    """Whether the models of a pipeline have a time for each token."""
    return bool(index.get("expand_timesteps"))


def load(source: Source, dtype: torch.dtype) -> PinnedFrameBackbone:
    """A Wan 2.2 TI2V model.  Raises PrflError for two transformers, and for one that reads more than latents."""
    schedule = flow_schedule(source)
    transformer = source.load(WanTransformer3DModel, "transformer", dtype)
    config: Any = transformer.config
    if config.image_dim is not None or config.in_channels != config.out_channels or config.patch_size[0] != 1:
        what = "its network does not take the first frame in the place of its latents, as Wan 2.2 TI2V-5B's does"
        raise PrflError(what, where=source.name, fix="give a TI2V-5B model, or one whose expand_timesteps is false")
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    check_vae(vae, source.name)
    if source.device.type == "cpu":
        vae_codec.channels_last(vae)
    facts = read_facts(source, transformer, vae, schedule)
    facts = replace(
        facts,
        family="wan_pinned_frame",
        identity={**facts.identity, "first_frame": "pinned"},
        condition={**facts.condition, FRAME: TensorSpec((facts.latent_channels, 1, "h", "w"), facts.dtype)},
        takes=frozenset({"text", "image"}),
    )
    text = WanText(*source.text_loaders(UMT5EncoderModel, dtype))
    return PinnedFrameBackbone({"transformer": transformer}, vae, text, facts)


WAN_PINNED_FRAME = Family(
    pipeline="WanImageToVideoPipeline",
    network="WanTransformer3DModel",
    task="image-to-video",
    fits=pins,
    load=load,
    lora=WAN.lora,
)
