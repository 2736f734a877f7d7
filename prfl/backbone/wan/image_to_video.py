"""Wan 2.1, image to video: the first frame as latents beside the noisy ones, and as CLIP's tokens beside the text's.

The network runs as diffusers has it, without prfl's kernels: its cross-attention splits the image's tokens from the
text's by counting 512 from the end, so the text's padding is not folded either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from prfl.backbone.base import Facts
from prfl.backbone.condition import EMBEDS, Condition, TensorSpec
from prfl.backbone.family import Family
from prfl.backbone.first_frame import FRAME, FirstFrameBackbone, check_size
from prfl.backbone.hooked import HookedBackbone
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.wan.codec import WanCodec
from prfl.backbone.wan.facts import read_facts
from prfl.backbone.wan.family import ARCHITECTURES, WAN
from prfl.backbone.wan.loading import check_vae, flow_schedule, has_two
from prfl.backbone.wan.pinned_frame import pins
from prfl.backbone.wan.text import TEXT_TOKENS, WanText, pad_to
from prfl.utils.errors import PrflError
from prfl.utils.pictures import as_image
from prfl.utils.video_size import VideoSize

SUPPORTED = "take Wan 2.1 I2V 14B, 480P or 720P, or Wan 2.2 I2V-A14B, of two transformers"
MASK, TOKENS = "frame_mask", "image_tokens"
"""Which frames of the latents are the picture's, and CLIP's view of it."""


class WanImageText(WanText):
    """UMT5, and CLIP's vision encoder: ViT-H, of 0.6 billion weights."""

    def __init__(
        self,
        load: Callable[[], tuple[Any, nn.Module]],
        load_tokenizer: Callable[[], Any] | None,
        load_image: Callable[[], tuple[Any, nn.Module]],
    ) -> None:
        super().__init__(load, load_tokenizer)
        self._load_image = load_image

    @cached_property
    def image_parts(self) -> tuple[Any, nn.Module]:
        """The processor of pictures, and their encoder."""
        return self._load_image()

    def encoder(self) -> nn.Module:
        return nn.ModuleList([self.text_encoder(), self.image_parts[1]])

    def free(self) -> None:
        super().free()
        self.__dict__.pop("image_parts", None)

    @torch.no_grad()
    def image_tokens(self, picture: Float[Tensor, "3 H W"]) -> Float[Tensor, "1 tokens width"]:
        """CLIP's hidden states before its last layer, as WanImageToVideoPipeline takes them."""
        processor, encoder = self.image_parts
        weight = next(encoder.parameters())
        pixels = processor(images=as_image(picture), return_tensors="pt").pixel_values
        return encoder(pixels.to(weight), output_hidden_states=True).hidden_states[-2]


class WanImageBackbone(FirstFrameBackbone, HookedBackbone, WanCodec):
    """A Wan 2.1 image-to-video model.  Made by ``load_backbone``; every base weight is frozen.

    Those of Wan 2.2 (image_experts.py) have no tokens of CLIP.
    """

    text: Any

    def frame_tensors(self, picture: Tensor, clip: VideoSize) -> dict[str, Tensor]:
        video = picture.new_zeros(1, 3, clip.frames, clip.height, clip.width)
        video[0, :, 0] = picture
        latents = self.encode(video)
        mask = latents.new_zeros(1, self.facts.temporal_factor, latents.shape[2], 1, 1)
        mask[:, :, 0] = 1
        tokens = {TOKENS: self.text.image_tokens(picture)} if TOKENS in self.facts.condition else {}
        return {FRAME: latents, MASK: mask, **tokens}

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        """The network's v = noise - x0.  Raises PrflError for a condition of a video of another size."""
        tensors = condition.to(latents.device, self.facts.dtype).tensors
        check_size(tensors[FRAME], latents, 3)
        mask = tensors[MASK].expand(-1, -1, -1, *latents.shape[3:])
        beside = torch.cat([latents.to(self.facts.dtype), mask, tensors[FRAME]], dim=1)
        timestep = (sigma.to(latents.device) * self.facts.schedule[1]).expand(len(latents))
        text = pad_to(tensors[EMBEDS], TEXT_TOKENS)
        with self.precision(self.network.patch_embedding.weight):
            (velocity,) = self.network(beside, timestep, text, tensors.get(TOKENS), return_dict=False)
        return velocity.to(latents.dtype)


def load(source: Source, dtype: torch.dtype) -> WanImageBackbone:
    """A Wan 2.1 image-to-video model.  Raises PrflError for the other models of its pipeline."""
    schedule = flow_schedule(source)
    transformer = source.load(WanTransformer3DModel, "transformer", dtype)
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    check_network(source, transformer.config, vae.config)
    check_vae(vae, source.name)
    text = WanImageText(
        *source.text_loaders(UMT5EncoderModel, dtype), source.image_loader(CLIPVisionModel, vae_dtype(dtype))
    )
    return WanImageBackbone({"transformer": transformer}, vae, text, facts_of(source, transformer, vae, schedule))


def check_network(source: Source, config: Any, vae: Any) -> None:
    """Raise PrflError unless the network reads a first frame as Wan 2.1's does: its latents, a mask, CLIP's tokens."""
    if config.image_dim is None:
        what = "an image-to-video model of one transformer without CLIP's tokens is not supported"
        raise PrflError(what, where=source.name, fix=SUPPORTED)
    check_reads_beside(source, config, vae)


def check_reads_beside(source: Source, config: Any, vae: Any) -> None:
    """Raise PrflError unless the network reads a first frame's latents and a mask beside the noisy latents."""
    beside, fix = config.out_channels + vae.scale_factor_temporal, SUPPORTED
    if config.pos_embed_seq_len is not None:
        what = "a model of first and last frame (FLF2V) is not supported"
        raise PrflError(what, where=source.name, fix=fix)
    if config.in_channels != config.out_channels + beside:
        what = f"its network reads {config.in_channels} channels, not {config.out_channels} and {beside} beside them"
        raise PrflError(what, where=source.name, fix=fix)


def facts_of(
    source: Source, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, schedule: tuple[float, float]
) -> Facts:
    facts = with_frame(read_facts(source, transformer, vae, schedule))
    clip = source.encoder_config("image_encoder")
    tokens = TensorSpec(((clip.image_size // clip.patch_size) ** 2 + 1, clip.hidden_size), facts.dtype)
    identity = source.text_identity("image_encoder", "image_processor")
    return replace(facts, family="wan_image", condition={**facts.condition, TOKENS: tokens}, text_identity=identity)


def with_frame(facts: Facts) -> Facts:
    """The facts of a Wan model whose network reads a first frame beside the noisy latents, as diffusers has it."""
    frame = {
        FRAME: TensorSpec((facts.latent_channels, "t", "h", "w"), facts.dtype),
        MASK: TensorSpec((facts.temporal_factor, "t", 1, 1), facts.dtype),
    }
    return replace(
        facts,
        kernels=(),
        attention=("sdpa",),
        lean_group=1,
        condition={**facts.condition, **frame},
        takes=frozenset({"text", "image"}),
    )


SHIPPED = ARCHITECTURES / "wan2.1-i2v-14b"  # of both; 720P's scheduler has a shift of 5, 480P's of 3 is in the files
WAN_IMAGE = Family(
    pipeline="WanImageToVideoPipeline",
    network="WanTransformer3DModel",
    task="image-to-video",
    fits=lambda index: not pins(index) and not has_two(index),
    load=load,
    lora=WAN.lora,
    shipped={f"Wan-AI/Wan2.1-I2V-14B-{size}-Diffusers": SHIPPED for size in ("480P", "720P")},
)
