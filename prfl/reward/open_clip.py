"""A CLIP whose weights have the names of the package open_clip, as HPS v2's file has them, as transformers' class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from prfl.reward.published import published_tensors
from prfl.utils.errors import PrflError

FIX = "give HPS_v2.1_compressed.pt of xswu/HPSv2, or its tensors as safetensors"
HEAD = 64  # channels of an attention head in every CLIP's text side, and in the image sides up to ViT-L
HEADS_OF_1280 = 16  # ViT-H has heads of 80 channels
# open_clip's names, those of both sides first; {side} is text_model or vision_model.
LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed


def read_open_clip(path: Path) -> CLIPModel:
    """Read a CLIP from a file of open_clip's tensors.  A .pt is a pickle: only its tensors are read, no code is run.

    Raises PrflError for another file, or a tensor that is missing, strange or not finite.
    """
    where = str(path)
    tensors = published_tensors(path, "a CLIP", FIX)
    if "visual.conv1.weight" not in tensors:
        raise PrflError("holds no CLIP in open_clip's names: it has no 'visual.conv1.weight'", where=where, fix=FIX)
    try:
        clip = CLIPModel(config_of(tensors))
        clip.load_state_dict(renamed(tensors))
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PrflError(f"is not all of a CLIP in open_clip's names: {reason}", where=where, fix=FIX) from error
    return clip


def config_of(tensors: Mapping[str, Tensor]) -> CLIPConfig:
    """Read the sizes of a CLIP from its tensors.  Raises KeyError."""
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    positions = len(tensors["visual.positional_embedding"]) - 1
    words, text_width = tensors["token_embedding.weight"].shape
    sides = {side: _layers(tensors, side) for side in ("", "visual.")}
    return CLIPConfig(
        projection_dim=tensors["text_projection"].shape[1],
        text_config={
            "hidden_size": text_width, "num_attention_heads": max(1, text_width // HEAD), "vocab_size": words,
            "max_position_embeddings": len(tensors["positional_embedding"]), "hidden_act": "gelu",
            "bos_token_id": words - 2, "eos_token_id": words - 1, **sides[""],
        },
        vision_config={
            "hidden_size": width, "num_attention_heads": HEADS_OF_1280 if width == 1280 else max(1, width // HEAD),
            "patch_size": patch, "image_size": patch * round(positions**0.5), "hidden_act": "gelu", **sides["visual."],
        },
    )  # fmt: skip


def _layers(tensors: Mapping[str, Tensor], side: str) -> dict[str, int]:
    """Return the number of layers of one side, and the width inside its MLPs."""
    prefix = f"{side}transformer.resblocks."
    numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}
    return {"num_hidden_layers": len(numbers), "intermediate_size": len(tensors[f"{prefix}0.mlp.c_fc.weight"])}


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give open_clip's tensors the names and shapes of transformers' CLIPModel; one that has none keeps its own."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.*)", name)
        if name in PROJECTIONS:
            result[PROJECTIONS[name]] = value.T
        elif not layer:
            result[WHOLE.get(name, name)] = value.reshape(()) if name == "logit_scale" else value
        else:
            side, number, part = layer.groups()
            prefix = f"{'vision' if side else 'text'}_model.encoder.layers.{number}."
            if part in ("attn.in_proj_weight", "attn.in_proj_bias"):  # query, key and value in one
                kind = part.rpartition("_")[2]
                for which, third in zip("qkv", value.chunk(3), strict=True):
                    result[f"{prefix}self_attn.{which}_proj.{kind}"] = third
            else:
                stem, _, kind = part.rpartition(".")
                result[f"{prefix}{LAYER.get(stem, stem)}.{kind}"] = value
    result.pop("attn_mask", None)  # open_clip's causal mask, which transformers makes itself
    return {name: value.float() for name, value in result.items()}
