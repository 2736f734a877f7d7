"""Putting a Wan text-to-video model together from its pipeline's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from prfl.backbone.source import Source, vae_dtype
from prfl.backbone.wan import vae as vae_codec
from prfl.backbone.wan.facts import read_facts
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.wan.text import WanText
from prfl.utils.errors import PrflError

SUPPORTED = (
    "supported are WanPipeline folders with one transformer (Wan 2.1, and Wan 2.2 TI2V-5B for text to video) and "
    "Wan 2.1's WanImageToVideoPipeline"
)


def check_pipeline(index: dict[str, Any], where: str) -> None:
    """The WanPipeline of a model_index.json must have one transformer.

    Where it expands timesteps to one per token (Wan 2.2 TI2V-5B), all of them are equal for text to video.
    """
    if index.get("transformer_2") not in (None, [None, None]) or index.get("boundary_ratio") is not None:
        raise PrflError("a Wan 2.2 pipeline (two transformers) is not supported yet", where=where, fix=SUPPORTED)


def check_vae(vae: AutoencoderKLWan, where: str) -> None:
    """The factors that the config states (WanPipeline goes by them) must be those of the layers."""
    config = vae.config
    stated = config.scale_factor_spatial, config.scale_factor_temporal
    real = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1), 2 ** sum(config.temperal_downsample)
    if stated != real:
        raise PrflError(
            f"the VAE's config states factors of {stated} in space and time, its layers have {real}",
            where=f"{where}/vae/config.json",
            fix="correct scale_factor_spatial and scale_factor_temporal",
        )


def load(source: Source, dtype: torch.dtype) -> WanBackbone:
    """A Wan text-to-video model.  Raises PrflError for models of another kind (image to video, two transformers)."""
    schedule = flow_schedule(source)
    transformer = source.load(WanTransformer3DModel, "transformer", dtype)
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    if source.device.type == "cpu":
        vae_codec.channels_last(vae)
    return assemble(source, schedule, transformer, vae, *source.text_loaders(UMT5EncoderModel, dtype))


def flow_schedule(source: Source) -> tuple[float, float]:
    """(shift of the sigmas, timestep of sigma 1) of a supported pipeline."""
    check_pipeline(source.index, source.name)
    scheduler = source.config(FlowMatchEulerDiscreteScheduler, "scheduler")
    shift = scheduler.get("flow_shift", scheduler.get("shift"))
    if shift is None:
        raise PrflError("the scheduler has no flow shift: not a flow-matching model", where=source.name, fix=SUPPORTED)
    return float(shift), float(scheduler.get("num_train_timesteps", 1000))


def assemble(
    source: Source,
    schedule: tuple[float, float],
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    load_text: Callable[[], tuple[Any, nn.Module]],
    load_tokenizer: Callable[[], Any] | None = None,
) -> WanBackbone:
    """Check that the parts are a text-to-video model and put them together."""
    if transformer.config.image_dim is not None or transformer.config.in_channels != transformer.config.out_channels:
        raise PrflError("an image-to-video transformer in a WanPipeline", where=source.name, fix=SUPPORTED)
    check_vae(vae, source.name)
    facts = read_facts(source, transformer, vae, schedule)
    return WanBackbone(transformer, vae, WanText(load_text, load_tokenizer), facts)
