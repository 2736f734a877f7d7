"""A backbone without its weights, on torch's ``meta`` device: shapes and dtypes, no memory, no download of gigabytes.

The architecture files of Wan 2.1 are part of the package (``architectures/``: the published hyperparameters of
Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers, as diffusers' own classes write them down).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from prfl.backbone.wan.loading import Source, assemble, flow_schedule, vae_dtype
from prfl.backbone.wan.model import WanBackbone
from prfl.backbone.weights import cast

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


def empty_text_encoder(source: Source, dtype: torch.dtype) -> UMT5EncoderModel:
    try:
        config = UMT5Config.from_pretrained(source.name, subfolder="text_encoder", revision=source.revision)
    except (OSError, ValueError) as error:
        raise source.missing("text encoder", error) from error
    with torch.device("meta"):
        return UMT5EncoderModel(config).to(dtype).requires_grad_(False).eval()


def small_block(kind: str, dtype: torch.dtype, head_dim: int) -> Callable[[], Tensor]:
    """A network of one block with random weights on a device, as a function of nothing: to see how it computes."""
    shape = dict(num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=4, text_dim=16)
    network = WanTransformer3DModel(**shape, freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32)
    network = cast(network, dtype).to(kind)
    latents = torch.randn(1, 4, 1, 32, 32, device=kind, dtype=dtype)
    text = torch.randn(1, 8, 16, device=kind, dtype=dtype)
    return lambda: network(latents, torch.full((1,), 500.0, device=kind), text).sample
