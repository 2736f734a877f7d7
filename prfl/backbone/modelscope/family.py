"""ModelScope's text-to-video UNet: how it is loaded, what it says of itself, and the line of the table of families.

``architectures/text-to-video-ms-1.7b`` are the hyperparameters of ali-vilab/text-to-video-ms-1.7b.  Network and VAE are
the defaults of diffusers' UNet and those of Stable Diffusion's VAE; the scheduler's and the text encoder's are from
memory, and not compared with the hub's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet3DConditionModel
from transformers import CLIPTextModel

from prfl.backbone.base import Facts
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.flow_form import VariancePreserving
from prfl.backbone.modelscope.model import ModelScopeBackbone
from prfl.backbone.on_path import load_scheduler
from prfl.backbone.padded_text import PaddedText, condition_specs
from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.unet import PREPARED, unet_facts, with_adapters

SHIPPED = Path(__file__).parent / "architectures/text-to-video-ms-1.7b"
TEXT_TOKENS = 77  # of CLIP
# Of diffusers' configs, what another value of changes the numbers that the same weights give.
SETTINGS = (
    "act_fn", "attention_head_dim", "downsample_padding", "mid_block_scale_factor", "norm_eps", "norm_num_groups",
    "scaling_factor",
)  # fmt: skip
SCHEDULE = {"timestep_spacing": "leading", "clip_sample": False, "thresholding": False}  # DDIM is Euler with these
NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "steps_offset")  # that the path and its chain follow from


def load(source: Source, dtype: torch.dtype) -> ModelScopeBackbone:
    """A model of TextToVideoSDPipeline.  Raises PrflError for a scheduler on whose timesteps DDIM is not Euler."""
    scheduler = load_scheduler(source, DDIMScheduler, SCHEDULE)
    unet = with_adapters(source.load(UNet3DConditionModel, "unet", dtype))
    vae = source.load(AutoencoderKL, "vae", vae_dtype(dtype))
    text = PaddedText(*source.text_loaders(CLIPTextModel, dtype), TEXT_TOKENS)
    return ModelScopeBackbone({"unet": unet}, vae, text, read_facts(source, unet, vae, scheduler), scheduler)


def read_facts(source: Source, unet: UNet3DConditionModel, vae: AutoencoderKL, scheduler: DDIMScheduler) -> Facts:
    config: Any = unet.config
    return unet_facts(
        source,
        unet,
        vae,
        SETTINGS,
        family="modelscope",
        schedule=tuple(float(scheduler.config[name]) for name in NUMBERS),
        head_size=config.attention_head_dim,
        condition=condition_specs(TEXT_TOKENS, config.cross_attention_dim, unet.conv_in.weight.dtype),
        text_tokens=TEXT_TOKENS,
        text_width=config.cross_attention_dim,
        text_identity=source.text_identity(),
        latent_channels=config.in_channels,
        prefix_decodes=True,
        shift=VariancePreserving(scheduler.alphas_cumprod).shift,
    )


MODELSCOPE = Family(
    pipeline="TextToVideoSDPipeline",
    network="UNet3DConditionModel",
    load=load,
    lora=LoraFile(
        prefix="unet.",
        original_name=str,  # diffusers' own names serve the others too
        alpha_below=(),
        architecture="modelscope/lora",
        implementation="https://github.com/huggingface/diffusers",
        before=PREPARED,
    ),
    shipped={"ali-vilab/text-to-video-ms-1.7b": SHIPPED},
    usual=(16, 256 * 256, 8),
)
