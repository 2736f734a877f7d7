"""A random tiny text-to-video pipeline of ModelScope's classes in the real diffusers folder format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests.tiny import CHANNELS, TEXT_WIDTH, WORDS, tiny_tokenizer

TOKENS = 77  # of a text
SHAPE = (CHANNELS, 3, 4, 4)  # 3 frames of 16 x 16


def tiny_unet(**changes) -> UNet3DConditionModel:
    """2 blocks down (widths 16 and 32), one in the middle, 2 up; heads of 8."""
    settings = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "norm_num_groups": 8, "attention_head_dim": 8,
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": TEXT_WIDTH, "sample_size": 4,
    }  # fmt: skip
    return UNet3DConditionModel(**{**settings, **changes}).eval()


def tiny_image_vae() -> AutoencoderKL:
    """4x in space; a scaling that is not 1, so that a forgotten one shows."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7,
    ).eval()  # fmt: skip


def save_tiny_modelscope(folder: Path, seed: int = 0, **unet_changes) -> Path:
    text = CLIPTextConfig(
        vocab_size=len(WORDS) + 3, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=TEXT_WIDTH, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = TOKENS
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = tiny_unet(**unet_changes)
        for name, parameter in unet.named_parameters():  # diffusers starts its layers over time at nothing
            if "temp" in name and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        TextToVideoSDPipeline(
            tokenizer=tokenizer,
            text_encoder=CLIPTextModel(text).eval(),
            vae=tiny_image_vae(),
            unet=unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1,
            ),
        ).save_pretrained(folder)  # fmt: skip
    return folder
