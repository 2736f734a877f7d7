"""A random tiny Stable Video Diffusion pipeline in the real diffusers folder format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny import CHANNELS

SHAPE = (CHANNELS, 3, 4, 4)  # 3 frames of 16 x 16
WIDTH = 16  # of the picture's embedding


def tiny_unet(**changes) -> UNetSpatioTemporalConditionModel:
    """2 blocks down (widths 32 and 64), one in the middle, 2 up; heads of 16."""
    settings = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "in_channels": 2 * CHANNELS, "out_channels": CHANNELS,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_frames": 3,
        "num_attention_heads": (2, 4), "cross_attention_dim": WIDTH, "sample_size": 4, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
    }  # fmt: skip
    return UNetSpatioTemporalConditionModel(**{**settings, **changes}).eval()


def tiny_temporal_vae() -> AutoencoderKLTemporalDecoder:
    """4x in space; a scaling that is not 1, so that a forgotten one shows."""
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32), latent_channels=CHANNELS,
        layers_per_block=1, scaling_factor=0.7,
    ).eval()  # fmt: skip


def save_tiny_svd(folder: Path, seed: int = 0, **unet_changes) -> Path:
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224,
        patch_size=56, projection_dim=WIDTH,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet(**unet_changes)
        for name, parameter in unet.named_parameters():  # how much of time is mixed in: apart from one half
            if name.endswith("mix_factor"):
                torch.nn.init.normal_(parameter)
        StableVideoDiffusionPipeline(
            vae=tiny_temporal_vae(),
            image_encoder=CLIPVisionModelWithProjection(vision).eval(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                sigma_max=700.0, sigma_min=0.002, steps_offset=1, timestep_spacing="leading",
                timestep_type="continuous", use_karras_sigmas=True,
            ),
            feature_extractor=CLIPImageProcessorPil(),
        ).save_pretrained(folder)  # fmt: skip
    return folder
