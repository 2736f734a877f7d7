"""CogVideoX, text to video: how it is loaded, what it says of itself, and the line of the table of families.

``architectures/cogvideox-2b`` are the hyperparameters of THUDM/CogVideoX-2b.  Network and VAE are the defaults of
diffusers' classes; the scheduler's and the text encoder's are from memory, and not compared with the hub's files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5EncoderModel

from prfl.backbone.base import SIGMA_CONVENTION, Facts
from prfl.backbone.cogvideox.model import CogVideoXBackbone
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.fingerprint import SAMPLED, fingerprint, settings_fingerprint
from prfl.backbone.flow_form import VariancePreserving
from prfl.backbone.on_path import load_scheduler
from prfl.backbone.padded_text import PaddedText, condition_specs
from prfl.backbone.source import Source, vae_dtype
from prfl.utils.errors import PrflError

SHIPPED = Path(__file__).parent / "architectures/cogvideox-2b"
# Of diffusers' configs, what another value of changes the numbers that the same weights give.
SETTINGS = (
    "activation_fn", "attention_head_dim", "flip_sin_to_cos", "freq_shift", "norm_eps", "num_attention_heads",
    "patch_size", "sample_frames", "sample_height", "sample_width", "spatial_interpolation_scale",
    "temporal_interpolation_scale", "timestep_activation_fn", "use_rotary_positional_embeddings", "norm_num_groups",
    "scaling_factor", "temporal_compression_ratio",
)  # fmt: skip
SCHEDULE = {  # with these a chain begins at noise and ends at data
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "timestep_spacing": "trailing",
}
NUMBERS = ("num_train_timesteps", "beta_start", "beta_end", "snr_shift_scale")  # that the path follows from


def load(source: Source, dtype: torch.dtype) -> CogVideoXBackbone:
    """A CogVideoX 1.0 model.  Raises PrflError for CogVideoX 1.5, and for a chain that does not begin at noise."""
    scheduler = load_scheduler(source, CogVideoXDDIMScheduler, SCHEDULE)
    transformer = source.load(CogVideoXTransformer3DModel, "transformer", dtype)
    if transformer.config.patch_size_t is not None:
        what = "CogVideoX 1.5, which has patches over time, is not supported yet"
        raise PrflError(what, where=source.name, fix="take CogVideoX-2b or -5b")
    vae = source.load(AutoencoderKLCogVideoX, "vae", vae_dtype(dtype))
    tokens = transformer.config.max_text_seq_length
    text = PaddedText(*source.text_loaders(T5EncoderModel, dtype), tokens)
    facts = read_facts(source, transformer, vae, scheduler)
    return CogVideoXBackbone({"transformer": transformer}, vae, text, facts, scheduler)


def read_facts(
    source: Source,
    transformer: CogVideoXTransformer3DModel,
    vae: AutoencoderKLCogVideoX,
    scheduler: CogVideoXDDIMScheduler,
) -> Facts:
    config: Any = transformer.config
    width, dtype = config.num_attention_heads * config.attention_head_dim, transformer.patch_embed.proj.weight.dtype
    spatial, temporal = 2 ** (len(vae.config.block_out_channels) - 1), int(vae.config.temporal_compression_ratio)
    identity = {
        "model_id": source.model_id,
        "revision": source.revision,
        "num_blocks": config.num_layers,
        "width": width,
        "latent_channels": config.in_channels,
        "patch_size": [1, config.patch_size, config.patch_size],
        "spatial_factor": spatial,
        "temporal_factor": temporal,
        "scaling_factor": vae.config.scaling_factor,
        "sigma_convention": SIGMA_CONVENTION,
        "transformer_fingerprint": fingerprint(transformer, most=SAMPLED),
        "vae_fingerprint": fingerprint(vae),
    }
    return Facts(
        family="cogvideox",
        model_id=source.model_id,
        revision=source.revision,
        identity=identity,
        settings=settings_fingerprint(config, vae.config, names=SETTINGS),
        schedule=tuple(float(scheduler.config[name]) for name in NUMBERS),
        blocks={"transformer": ("transformer_blocks",)},
        widths=(width,) * config.num_layers,
        head_size=config.attention_head_dim,
        condition=condition_specs(config.max_text_seq_length, config.text_embed_dim, dtype),
        text_tokens=config.max_text_seq_length,
        text_width=config.text_embed_dim,
        text_identity=source.text_identity(),
        latent_channels=config.in_channels,
        patch=(1, config.patch_size, config.patch_size),
        spatial_factor=spatial,
        temporal_factor=temporal,
        prefix_decodes=False,
        shift=VariancePreserving(scheduler.alphas_cumprod).shift,
        device=transformer.patch_embed.proj.weight.device,
        dtype=dtype,
        vae_dtype=vae.dtype,
        variance_preserving=True,
    )


COGVIDEOX = Family(
    pipeline="CogVideoXPipeline",
    network="CogVideoXTransformer3DModel",
    load=load,
    lora=LoraFile(
        prefix="transformer.",
        original_name=str,  # diffusers' own names serve the others too
        alpha_below=(),
        architecture="cogvideox/lora",
        implementation="https://github.com/huggingface/diffusers",
    ),
    shipped={"THUDM/CogVideoX-2b": SHIPPED},
    usual=(49, 480 * 720, 8),
)
