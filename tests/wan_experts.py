"""A random tiny Wan 2.2 A14B pipeline in the real diffusers folder format: two transformers that share the chain."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from tests.tiny import text_and_vae, tiny_transformer

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
