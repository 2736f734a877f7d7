"""A backbone without its weights, on torch's ``meta`` device: shapes and dtypes, no memory, no download of gigabytes.

The architecture files of Wan 2.1 are part of the package (``architectures/``: the published hyperparameters of
Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers, as diffusers' own classes write them down).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from prfl.backbone.wan.loading import Source, assemble, flow_schedule, vae_dtype
from prfl.backbone.wan.model import WanBackbone

SHIPPED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "wan2.1-1.3b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-14b",
}


def architecture_place(folder_or_hub: str) -> str:
    """Where the architecture files are: the folder itself, inside the package, or else on the hub."""
    if Path(folder_or_hub).is_dir() or folder_or_hub not in SHIPPED:
        return folder_or_hub
    return str(Path(__file__).parent / "architectures" / SHIPPED[folder_or_hub])


def load_architecture(
    folder_or_hub: str | Path, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> WanBackbone:
    """The model that ``load_backbone`` would load, on ``meta``; it has no tokenizer, so ``condition`` does not work.

    Raises PrflError like ``load_backbone``.
    """
    place = architecture_place(str(folder_or_hub))
    source = Source(place, None if place != str(folder_or_hub) else revision, torch.device("meta"))
    schedule = flow_schedule(source)
    transformer = empty(source, WanTransformer3DModel, "transformer", dtype)
    vae = empty(source, AutoencoderKLWan, "vae", vae_dtype(dtype))
    return assemble(source, schedule, transformer, vae, lambda: (None, empty_text_encoder(source, dtype)))


def empty(source: Source, kind: Any, subfolder: str, dtype: torch.dtype) -> Any:
    config = source.config(kind, subfolder)
    with torch.device("meta"):
        return cast(kind.from_config(config), dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As ``from_pretrained`` does: diffusers names the modules that stay in float32; buffers are left alone."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or [])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    return model


def empty_text_encoder(source: Source, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        config = UMT5Config.from_pretrained(source.name, subfolder="text_encoder", revision=source.revision)
    except (OSError, ValueError) as error:
        raise source.missing("text encoder", error) from error
    with torch.device("meta"):
        return UMT5EncoderModel(config).to(dtype).requires_grad_(False).eval()
