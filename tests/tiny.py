"""A random tiny Wan pipeline of the real classes, in the real diffusers folder format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = (
    "a", "red", "green", "blue", "yellow", "circle", "square", "triangle", "moves",
    "left", "right", "up", "down", "quickly", "slowly",
)  # fmt: skip
CHANNELS, TEXT_WIDTH = 4, 16


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_text_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(WORDS) + 3, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip


def tiny_vae() -> AutoencoderKLWan:
    """4x in space and time; latent statistics are not 0 and 1, so that a forgotten normalisation shows."""
    return AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 0.8, 1.0],
        scale_factor_spatial=4, scale_factor_temporal=4,
    ).eval()  # fmt: skip


def tiny_transformer(**changes) -> WanTransformer3DModel:
    """3 blocks of width 24 (2 heads of 12)."""
    settings = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS,
        "out_channels": CHANNELS, "text_dim": TEXT_WIDTH, "freq_dim": 16, "ffn_dim": 48, "num_layers": 3,
        "rope_max_seq_len": 32,
    }  # fmt: skip
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def text_and_vae() -> dict[str, Any]:
    """The parts that are Wan's in every tiny pipeline."""
    return {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}


def save_tiny_pipeline(folder: Path, seed: int = 0, **transformer_changes) -> Path:
    """Write a random pipeline of the real classes; another seed gives other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        WanPipeline(
            **text_and_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=tiny_transformer(**transformer_changes),
        ).save_pretrained(folder)
    return folder
