"""A random tiny CogVideoX pipeline in the real diffusers folder format."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from tests.tiny import CHANNELS, TEXT_WIDTH, WORDS, tiny_tokenizer

TOKENS = 8  # of a text
SHAPE = (CHANNELS, 3, 4, 4)  # 9 frames of 16 x 16


def tiny_cogvideox_transformer(**changes) -> CogVideoXTransformer3DModel:
    """3 blocks of width 32 (2 heads of 16), positions added as in the 2B, or rotary as in the 5B."""
    settings = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "time_embed_dim": 16, "text_embed_dim": TEXT_WIDTH, "num_layers": 3, "sample_width": 4, "sample_height": 4,
        "sample_frames": 9, "max_text_seq_length": TOKENS,
    }  # fmt: skip
    return CogVideoXTransformer3DModel(**{**settings, **changes}).eval()


def tiny_cogvideox_vae() -> AutoencoderKLCogVideoX:
    """4x in space and time; a scaling that is not 1, so that a forgotten one shows."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(4, 4, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=2,
        scaling_factor=0.7,
    ).eval()  # fmt: skip


def save_tiny_cogvideox(folder: Path, seed: int = 0, **transformer_changes) -> Path:
    encoder = T5Config(
        vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CogVideoXPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=T5EncoderModel(encoder).eval(),
            vae=tiny_cogvideox_vae(),
            transformer=tiny_cogvideox_transformer(**transformer_changes),
            scheduler=CogVideoXDDIMScheduler(
                prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
                clip_sample=False,
            ),
        ).save_pretrained(folder)  # fmt: skip
    return folder
