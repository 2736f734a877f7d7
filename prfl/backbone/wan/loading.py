"""Putting a Wan text-to-video model together from its pipeline's parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "supported are WanPipeline folders (Wan 2.1, and Wan 2.2's TI2V-5B and T2V-A14B for text to video) and "
    "Wan 2.1's WanImageToVideoPipeline"
)


def has_two(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json has two transformers that share the chain (Wan 2.2 A14B)."""
    return index.get("transformer_2") not in (None, [None, None]) or index.get("boundary_ratio") is not None


def check_one(index: Mapping[str, Any], where: str) -> None:
    """Raise PrflError for a pipeline of two transformers.

    One that expands timesteps to one per token (Wan 2.2 TI2V-5B) is no matter: for text to video all are equal.
    """
    if has_two(index):
        what = f"a {index.get('_class_name')} of two transformers is not supported"
        raise PrflError(what, where=where, fix=SUPPORTED)


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
    """A Wan text-to-video model.  Raises PrflError for models of another kind (image to video)."""
    schedule = flow_schedule(source)
    transformer = source.load(WanTransformer3DModel, "transformer", dtype)
    vae = source.load(AutoencoderKLWan, "vae", vae_dtype(dtype))
    if source.device.type == "cpu":
        vae_codec.channels_last(vae)
    return assemble(source, schedule, transformer, vae, *source.text_loaders(UMT5EncoderModel, dtype))


def flow_schedule(source: Source) -> tuple[float, float]:
    """(shift of the sigmas, timestep of sigma 1) of a supported pipeline with one transformer."""
    check_one(source.index, source.name)
    return read_schedule(source)


def read_schedule(source: Source) -> tuple[float, float]:
    """(shift of the sigmas, timestep of sigma 1).  Raises PrflError for a scheduler that is not of a flow."""
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
    check_reads_text(transformer, source.name)
    check_vae(vae, source.name)
    facts = read_facts(source, transformer, vae, schedule)
    return WanBackbone({"transformer": transformer}, vae, WanText(load_text, load_tokenizer), facts)


def check_reads_text(transformer: WanTransformer3DModel, where: str) -> None:
    """Raise PrflError for a network of an image-to-video model."""
    if transformer.config.image_dim is not None or transformer.config.in_channels != transformer.config.out_channels:
        raise PrflError("an image-to-video transformer in a WanPipeline", where=where, fix=SUPPORTED)
