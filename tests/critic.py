"""Tiny random vision-language models of both families, with the words of the shapes world."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from prfl.reward.questions import Question, Questions
from prfl.toy.critic_recipe import new_tokenizer

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
QUESTIONS = Questions(
    {
        "a red circle moves left": [
            Question("colour", "is its colour red?", "yes"),
            Question("shape", "what shape is it?", "circle"),
            Question("speed", "does it move quickly?", "no"),
        ],
        "a blue square": [
            Question("shape", "is the shape a bar?", "no"),
            Question("look", "describe the video.", "a blue bar moves up quickly and steadily"),
        ],
        "*": [Question("steady", "does it move steadily?", "yes")],
    }
)


def tiny_vlm(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Frozen; its weights are large enough that every part of the input matters."""
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "video": "<|video_pad|>", "image": "<|image_pad|>", "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }  # fmt: skip
    text: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        depth=2, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=4, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "qwen3_vl":
            vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
            network: Any = Qwen3VLForConditionalGeneration(
                Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **ids)
            )
        else:
            vision |= dict(window_size=16, fullatt_block_indexes=[1])
            network = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
            )
        for weights in network.parameters():
            weights.data = torch.randn_like(weights) * 0.15 if weights.ndim > 1 else weights.data
    return network.requires_grad_(False).eval()


def tiny_words() -> PreTrainedTokenizerFast:
    return new_tokenizer()
