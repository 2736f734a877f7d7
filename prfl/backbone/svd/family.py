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

from prfl.backbone.base import SIGMA_CONVENTION, Facts
from prfl.backbone.condition import EMBEDS, LENGTHS, TensorSpec
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.first_frame import FRAME
from prfl.backbone.on_path import load_scheduler
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.svd.model import ADDED, Pictures, SvdBackbone, path_of
from prfl.backbone.unet import LISTS, PREPARED, block_shapes, with_adapters

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
    dtype, spatial = unet.conv_in.weight.dtype, 2 ** (len(vae.config.block_out_channels) - 1)
    channels, heads, width = config.block_out_channels, config.num_attention_heads, config.cross_attention_dim
    widths, strides = block_shapes(channels)
    identity = {
        "model_id": source.model_id,
        "revision": source.revision,
        "num_blocks": len(widths),
        "width": list(widths),
        "latent_channels": config.out_channels,
        "patch_size": [1, 1, 1],
        "spatial_factor": spatial,
        "temporal_factor": 1,
        "scaling_factor": vae.config.scaling_factor,
        "sigma_convention": SIGMA_CONVENTION,
        "unet_fingerprint": fingerprint(unet, most=SAMPLED),
        "vae_fingerprint": fingerprint(vae),
    }
    return Facts(
        family="svd",
        model_id=source.model_id,
        revision=source.revision,
        identity=identity,
        settings=settings_fingerprint(config, vae.config, names=SETTINGS),
        schedule=(scheduler.config.sigma_min, scheduler.config.sigma_max),
        blocks={"unet": LISTS},
        widths=widths,
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
        patch=(1, 1, 1),
        spatial_factor=spatial,
        temporal_factor=1,
        prefix_decodes=False,
        shift=path_of(scheduler).shift,
        device=unet.conv_in.weight.device,
        dtype=dtype,
        vae_dtype=vae.dtype,
        strides=strides,
        variance_preserving=True,
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
