"""The layers of Wan as the original checkpoint names them, which ComfyUI reads and diffusers translates back."""

from __future__ import annotations

import re

from prfl.utils.errors import PrflError

IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "proj_out": "head.head",
}


def original_name(layer: str) -> str:
    """Translate ``blocks.0.attn1.to_q`` (diffusers) to ``blocks.0.self_attn.q`` (Wan, ComfyUI).  Raises PrflError."""
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", layer)
    name = IN_BLOCK.get(block[2]) if block else OUTSIDE.get(layer)
    if name is None:
        raise PrflError(
            f"the layer {layer} has no name in the original Wan checkpoint",
            where="backbone.adapter.targets",
            fix="train an adapter on other layers, or export merged weights (--merged)",
        )
    return f"{block[1]}.{name}" if block else name
