"""Stable Video Diffusion: how it is loaded, what it says of itself, and the line of the table of families.

``architectures/img2vid-xt`` are the hyperparameters of stabilityai/stable-video-diffusion-img2vid-xt: diffusers'
defaults of these classes and CLIP's ViT-H, from memory, and not compared with the hub's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from transformers import CLIPVisionModelWithProjection

from prfl.backbone.base import Facts
from prfl.backbone.condition import EMBEDS, LENGTHS, TensorSpec
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.first_frame import FRAME
from prfl.backbone.on_path import load_scheduler
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.svd.model import ADDED, Pictures, SvdBackbone, path_of
from prfl.backbone.unet import PREPARED, unet_facts, with_adapters

SHIPPED = Path(__file__).parent / "architectures/img2vid-xt"
# Of diffusers' configs, what another value of changes the numbers that the same weights give.
SETTINGS = ("num_attention_heads", "addition_time_embed_dim", "transformer_layers_per_block", "scaling_factor")
# EulerDiscrete is Euler on the flow with these.
SCHEDULE = {
    "prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True,
    "timestep_spacing": "leading", "final_sigmas_type": "zero",
}  # fmt: skip


def load(source: Source, dtype: torch.dtype) -> SvdBackbone:
    """A Stable Video Diffusion model.  Raises PrflError for a scheduler that is not Euler on the flow."""
    scheduler = load_scheduler(source, EulerDiscreteScheduler, SCHEDULE)
    unet = with_adapters(source.load(UNetSpatioTemporalConditionModel, "unet", dtype))
    vae = source.load(AutoencoderKLTemporalDecoder, "vae", vae_dtype(dtype))
    text = Pictures(source.image_loader(CLIPVisionModelWithProjection, vae_dtype(dtype), "feature_extractor"))
    return SvdBackbone({"unet": unet}, vae, text, read_facts(source, unet, vae, scheduler), scheduler)


def read_facts(
    source: Source, unet: UNetSpatioTemporalConditionModel, vae: AutoencoderKLTemporalDecoder, scheduler: Any
) -> Facts:
    config: Any = unet.config
    dtype, channels = unet.conv_in.weight.dtype, config.block_out_channels
    heads, width = config.num_attention_heads, config.cross_attention_dim
    return unet_facts(
        source,
        unet,
        vae,
        SETTINGS,
        family="svd",
        schedule=(scheduler.config.sigma_min, scheduler.config.sigma_max),
        head_size=channels[0] // (heads if isinstance(heads, int) else heads[0]),
        condition={
            EMBEDS: TensorSpec((1, width), dtype),
            LENGTHS: TensorSpec((), torch.int64, counts=EMBEDS),
            FRAME: TensorSpec((config.out_channels, "h", "w"), dtype),
            ADDED: TensorSpec((3,), dtype),
        },
        text_tokens=1,
        text_width=width,
        text_identity=source.text_identity("image_encoder", "feature_extractor"),
        takes=frozenset({"image"}),
        latent_channels=config.out_channels,
        prefix_decodes=False,
        shift=path_of(scheduler).shift,
    )


SVD = Family(
    pipeline="StableVideoDiffusionPipeline",
    network="UNetSpatioTemporalConditionModel",
    task="image-to-video",
    load=load,
    lora=LoraFile(
        prefix="unet.",
        original_name=str,  # diffusers' own names serve the others too
        alpha_below=(),
        architecture="stable-video-diffusion/lora",
        implementation="https://github.com/huggingface/diffusers",
        before=PREPARED,
        load='pipeline.unet.load_lora_adapter({arguments}, prefix="unet")',  # the pipeline has no such method
    ),
    shipped={"stabilityai/stable-video-diffusion-img2vid-xt": SHIPPED},
    usual=(25, 576 * 1024, 7),
)
