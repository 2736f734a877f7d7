"""Wan 2.2 I2V-A14B: two transformers that share the chain, and a first frame's latents beside the noisy ones.

Unlike Wan 2.1's they read no tokens of CLIP.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import UMT5EncoderModel

from prfl.backbone.experts import Experts
from prfl.backbone.family import Family
from prfl.backbone.source import Source
from prfl.backbone.wan.experts import WAN_EXPERTS, load_parts
from prfl.backbone.wan.family import ARCHITECTURES
from prfl.backbone.wan.image_to_video import WanImageBackbone, check_reads_beside, with_frame
from prfl.backbone.wan.loading import has_two
from prfl.backbone.wan.pinned_frame import pins
from prfl.backbone.wan.text import WanText
from prfl.utils.errors import PrflError


class WanImageExpertsBackbone(Experts, WanImageBackbone):
    """A Wan 2.2 image-to-video model of two experts.  Made by ``load_backbone``; every base weight is frozen."""


def load(source: Source, dtype: torch.dtype) -> WanImageExpertsBackbone:
    """A Wan 2.2 I2V-A14B model.  Raises PrflError for networks that read something else."""
    networks, vae, facts = load_parts(source, dtype)
    for network in networks.values():
        if network.config.image_dim is not None:
            what = "a model of two transformers that read CLIP's tokens is not supported"
            raise PrflError(what, where=source.name, fix="take Wan 2.2 I2V-A14B")
        check_reads_beside(source, network.config, vae.config)
    text = WanText(*source.text_loaders(UMT5EncoderModel, dtype))
    return WanImageExpertsBackbone(networks, vae, text, replace(with_frame(facts), family="wan_image_experts"))


WAN_IMAGE_EXPERTS = Family(
    pipeline="WanImageToVideoPipeline",
    network="WanTransformer3DModel",
    task="image-to-video",
    fits=lambda index: has_two(index) and not pins(index),
    load=load,
    lora=WAN_EXPERTS.lora,
    shipped={"Wan-AI/Wan2.2-I2V-A14B-Diffusers": ARCHITECTURES / "wan2.2-i2v-a14b"},
)
