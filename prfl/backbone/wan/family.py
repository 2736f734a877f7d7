"""Wan, text to video: the line of the table of families.

The architecture files of its hub models are part of the package (``architectures/``: the published hyperparameters, as
diffusers' own classes write them down; TI2V-5B's are from memory, and its latents' mean and deviation stand in for the
real ones, since files without weights give shapes alone).
"""

from __future__ import annotations

from pathlib import Path

from prfl.backbone.family import Family, LoraFile
from prfl.backbone.wan import lora_names
from prfl.backbone.wan.loading import has_two, load
from prfl.backbone.wan.text import padded_condition

ARCHITECTURES = Path(__file__).parent / "architectures"

WAN = Family(
    pipeline="WanPipeline",
    network="WanTransformer3DModel",
    fits=lambda index: not has_two(index),
    load=load,
    lora=LoraFile(
        prefix="diffusion_model.",
        original_name=lora_names.original_name,
        alpha_below=("blocks.",),
        architecture="wan2.1/lora",
        implementation="https://github.com/Wan-Video/Wan2.1",
        use="In ComfyUI put `{file}` into `models/loras` and load it with LoraLoaderModelOnly at strength 1.",
    ),
    shipped={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": ARCHITECTURES / "wan2.1-1.3b",
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": ARCHITECTURES / "wan2.1-14b",
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ARCHITECTURES / "wan2.2-ti2v-5b",
    },
    condition_in_loop=padded_condition,
)
