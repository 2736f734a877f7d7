"""What a Wan model says of itself."""

from __future__ import annotations

import math

from diffusers import AutoencoderKLWan, ModelMixin

from prfl.backbone.attention import NAMES
from prfl.backbone.base import SIGMA_CONVENTION, Facts
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.source import Source
from prfl.backbone.wan.kernels import SWAPPED
from prfl.backbone.wan.text import TEXT_TOKENS, condition_specs


def read_facts(source: Source, transformer: ModelMixin, vae: AutoencoderKLWan, schedule: tuple[float, float]) -> Facts:
    """transformer: Wan's, or one of its layout.  schedule: (shift of the sigmas, timestep of sigma 1)."""
    config, dtype = transformer.config, transformer.patch_embedding.weight.dtype
    width = config.num_attention_heads * config.attention_head_dim
    identity = {
        "model_id": source.model_id,
        "revision": source.revision,
        "num_blocks": config.num_layers,
        "width": width,
        "latent_channels": config.out_channels,
        "patch_size": list(config.patch_size),
        "spatial_factor": vae.config.scale_factor_spatial,
        "temporal_factor": vae.config.scale_factor_temporal,
        "latents_mean": list(vae.config.latents_mean),
        "latents_std": list(vae.config.latents_std),
        "sigma_convention": SIGMA_CONVENTION,
        "transformer_fingerprint": fingerprint(transformer, most=SAMPLED),
        "vae_fingerprint": fingerprint(vae),
    }
    return Facts(
        family="wan",
        model_id=source.model_id,
        revision=source.revision,
        identity=identity,
        settings=settings_fingerprint(config, vae.config),
        schedule=schedule,
        blocks={"transformer": ("blocks",)},
        widths=(width,) * config.num_layers,
        head_size=config.attention_head_dim,
        kernels=SWAPPED,
        attention=NAMES,
        lean_group=lean_group(config.num_layers, config.ffn_dim / width),
        condition=condition_specs(config.text_dim, dtype),
        text_tokens=TEXT_TOKENS,
        text_width=config.text_dim,
        text_identity=source.text_identity(),
        latent_channels=config.out_channels,
        patch=tuple(config.patch_size),
        spatial_factor=vae.config.scale_factor_spatial,
        temporal_factor=vae.config.scale_factor_temporal,
        prefix_decodes=True,
        shift=schedule[0],
        device=transformer.patch_embedding.weight.device,
        dtype=dtype,
        vae_dtype=vae.dtype,
    )


def lean_group(blocks: int, ffn_ratio: float) -> int:
    """Blocks that are best computed again together, where all kernels run.

    n / g kept states and the g s of the blocks that are computed again are fewest at g = sqrt(n / s), which is more
    than 1 only for blocks that save little themselves: s is 9 + hidden width / width with all kernels.
    """
    group = round(math.sqrt(blocks / (9 + ffn_ratio)))
    return group if group and blocks % group == 0 else 1
