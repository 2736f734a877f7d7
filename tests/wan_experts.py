"""A random tiny Wan 2.2 A14B pipeline in the real diffusers folder format: two transformers that share the chain."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline

from tests.tiny import CHANNELS, text_and_vae, tiny_transformer

BOUNDARY = 0.875


def save_tiny_experts(folder: Path, seed: int = 0, shift: float = 3.0, boundary: float = BOUNDARY, **changes) -> Path:
    """At shift 3 a chain of 10 steps has a node on the boundary, in float64 a hair below it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        WanPipeline(
            **text_and_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            transformer=tiny_transformer(**changes),
            transformer_2=tiny_transformer(**changes),
            boundary_ratio=boundary,
        ).save_pretrained(folder)
    return folder


def save_tiny_image_experts(folder: Path, seed: int = 0, boundary: float = 0.9, **changes) -> Path:
    """In the layout of Wan 2.2 I2V-A14B: a first frame's latents and a mask beside the noisy ones, no CLIP."""
    changes = {"in_channels": 2 * CHANNELS + 4, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        WanImageToVideoPipeline(
            **text_and_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            image_processor=None,
            image_encoder=None,
            transformer=tiny_transformer(**changes),
            transformer_2=tiny_transformer(**changes),
            boundary_ratio=boundary,
        ).save_pretrained(folder)
    return folder
