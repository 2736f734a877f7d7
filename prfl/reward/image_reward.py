"""ImageReward: how people rate a picture for its prompt, by a BLIP; the mean over a video's frames.

    score = (MLP(the text's first token, which attended to the picture) - 0.167) / 1.033

About -2 to 2.  BLIP's text side reads 35 tokens of the prompt; what is behind them is not read.
Source: arXiv 2304.05977, and its public code for the preparation, the tokens and the two numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from prfl.backbone.condition import Condition
from prfl.reward.aesthetic import AestheticMlp
from prfl.reward.look import Look, each_frame, frames_of, seen
from prfl.reward.public import FrozenReward
from prfl.reward.published import published_tensors
from prfl.reward.scores import Scores
from prfl.reward.tokens import Tokenise, read_tokeniser
from prfl.utils.errors import PrflError

FIX = "give ImageReward.pt of THUDM/ImageReward, or its tensors as safetensors"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the MLP's output, as published
TOKENS = 35
HEAD = 64  # channels of an attention head on both sides
# The file's names of the image side, and of a layer of it; the text side has transformers' own.
VISION = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "norm": "post_layernorm",
}  # fmt: skip
LAYER = {
    "norm1": "layer_norm1", "norm2": "layer_norm2", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
VIT_L_16 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "image_size": 224}
BERT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 30524}


class ImageReward(FrozenReward):
    """``reward(pixels, condition)`` gives {"imagereward": (b,)}, differentiable in the pixels; it reads the prompts.

    tokenise: prompts to input_ids and attention_mask, each (b, tokens).  mlp: has the shape of LAION's aesthetic one.
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, mlp: AestheticMlp, tokenise: Tokenise) -> None:
        super().__init__(("imagereward",), vision, text, mlp)
        self.vision, self.text, self.mlp, self.tokenise = vision, text, mlp, tokenise
        self.look = Look(vision.config.image_size, "crop")

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read."""
        words = self.tokenise([ask.prompt for ask in condition.asks])
        of_frames = [
            words[name].to(pixels.device).repeat_interleave(pixels.shape[2], dim=0)
            for name in ("input_ids", "attention_mask")
        ]
        scores = each_frame(self.score_frames, frames_of(pixels), *of_frames)
        return {self.dimensions[0]: scores.unflatten(0, (len(pixels), -1)).mean(1)}

    def score_frames(
        self, frames: Float[Tensor, "n 3 h w"], ids: Int[Tensor, "n k"], mask: Int[Tensor, "n k"]
    ) -> Float[Tensor, " n"]:
        """Score single frames, pixels about [-1, 1], beside their prompts' tokens."""
        inputs = seen(frames.to(self.mlp.layers[0].weight.dtype), self.look)
        patches = self.vision(pixel_values=inputs).last_hidden_state
        read = None if mask.is_meta else mask  # transformers looks into one
        words = self.text(input_ids=ids, attention_mask=read, encoder_hidden_states=patches, is_decoder=False)
        return (self.mlp(words.last_hidden_state[:, 0]) - MEAN) / STD


def load_image_reward(
    weights: str | Path, tokenizer: str, revision: str | None = None, device: torch.device | str = "cpu"
) -> ImageReward:
    """Load ImageReward from its .pt file, or its tensors as safetensors, with BERT's tokenizer.  Raises PrflError."""
    path = Path(weights)
    tensors = published_tensors(path, "an ImageReward", FIX)
    try:
        networks = networks_of(tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PrflError(f"is not all of an ImageReward: {reason}", where=str(path), fix=FIX) from error
    return ImageReward(*networks, read_tokeniser(tokenizer, revision, "google-bert/bert-base-uncased", TOKENS)).to(
        device
    )


def networks_of(tensors: Mapping[str, Tensor]) -> tuple[BlipVisionModel, BlipTextModel, AestheticMlp]:
    """Make the three networks of the file's tensors, with the sizes that these have.  Raises KeyError, RuntimeError."""
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder": {}, "blip.text_encoder": {}, "mlp": {}}
    for name, value in tensors.items():
        for prefix, part in parts.items():
            if name.startswith(f"{prefix}.") and "position_ids" not in name:
                part[name.removeprefix(f"{prefix}.")] = value.float()
    vision, text, mlp = parts.values()

    width, _, patch, _ = vision["patch_embed.proj.weight"].shape
    words, text_width = text["embeddings.word_embeddings.weight"].shape
    first = "encoder.layer.0.intermediate.dense.weight"
    networks = build(
        {
            "hidden_size": width, "intermediate_size": len(vision["blocks.0.mlp.fc1.weight"]), "patch_size": patch,
            "num_hidden_layers": len({name.split(".")[1] for name in vision if name.startswith("blocks.")}),
            "image_size": patch * round((vision["pos_embed"].shape[1] - 1) ** 0.5),
        },
        {
            "hidden_size": text_width, "intermediate_size": len(text[first]), "vocab_size": words,
            "num_hidden_layers": len({name.split(".")[2] for name in text if name.startswith("encoder.layer.")}),
            "max_position_embeddings": len(text["embeddings.position_embeddings.weight"]),
        },
    )  # fmt: skip
    text = {name: value for name, value in text.items() if not name.startswith("pooler.")}
    for network, state in zip(networks, (renamed(vision), text, mlp), strict=True):
        network.load_state_dict(state)
    return networks


def build(vision: Mapping[str, int], text: Mapping[str, int]) -> tuple[BlipVisionModel, BlipTextModel, AestheticMlp]:
    """Build the three networks in these sizes, with random weights; every text layer attends to the picture."""
    image_side = BlipVisionConfig(**vision, num_attention_heads=heads(vision), layer_norm_eps=1e-6)
    text_side = BlipTextConfig(**text, num_attention_heads=heads(text), encoder_hidden_size=vision["hidden_size"])
    networks = BlipVisionModel(image_side), BlipTextModel(text_side, add_pooling_layer=False)
    return *networks, AestheticMlp(text["hidden_size"])


def heads(sizes: Mapping[str, int]) -> int:
    return max(1, sizes["hidden_size"] // HEAD)


def renamed(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the image side's tensors transformers' names; one that has none keeps its own."""
    result = {}
    for name, value in vision.items():
        layer = re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name)
        if layer:
            number, part, kind = layer.groups()
            result[f"encoder.layers.{number}.{LAYER.get(part, part)}.{kind}"] = value
        else:
            stem, _, kind = name.rpartition(".")
            result[VISION.get(name) or f"{VISION.get(stem, stem)}.{kind}"] = value
    return result


def untrained() -> ImageReward:
    """Build one of the published size, whose bytes are counted on ``meta``; its words are all the same."""

    def tokenise(prompts: list[str]) -> dict[str, Tensor]:
        ids = torch.zeros(len(prompts), TOKENS, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return ImageReward(*build(VIT_L_16, BERT), tokenise)
