"""Plain torch, in the order of the formula: the path that runs without a kernel, and what a kernel is tested against.

Shape suffixes: B batch, T tokens, D width, Q queries, H heads, C = D / H channels of a head, R rank.
Each computes in float32 at least where it says so, and returns the type of its first argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T (LoRA, arXiv 2106.09685), the adapter's weights rounded to x's dtype.

    x: (..., D).  weight: (N, D).  bias: (N,).  lora_a: (R, D).  lora_b: (N, R).  Returns (..., N).
    """
    base = torch.nn.functional.linear(x, weight, bias)
    return base + scale * (x @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T


def qk_norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, eps: float = 1e-6
) -> Tensor:
    """RMS norm over all heads together, then interleaved rotary embedding, as Wan's self-attention has them.

    With n = x / sqrt(mean(x^2) + eps) * weight: out[2i] = n[2i] cos[2i] - n[2i+1] sin[2i+1] and
    out[2i+1] = n[2i] sin[2i+1] + n[2i+1] cos[2i] within each head.  Without cos and sin (cross-attention) only n.
    x: (B, T, D).  weight: (D,).  cos, sin: (1, T, 1, C), C = D / heads, as diffusers' WanRotaryPosEmbed gives them.
    In float32 at least.  Returns (B, T, D).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    return (normed if cos is None or sin is None else rotate(normed, cos, sin, heads)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The rotary embedding of ``qk_norm_rope`` by itself.  Returns (B, T, D) in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.unflatten(-1, (heads, -1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2].to(wide), sin[..., 1::2].to(wide)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-3).to(x.dtype)


def gated_residual_norm(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x' = x + gate y, then AdaLN: (x', (1 + scale) (x' - mean) / sqrt(variance + eps) + shift), as in Wan's blocks.

    x, y: (B, T, D); without y, x' = x; without gate it is 1.  gate, scale, shift: (B, 1, D), (B, T, D) where every
    token has its own time (Wan 2.2), or (D,) for a plain affine norm.  The sum is rounded to x's dtype before the norm.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if y is not None:
        x = (x.to(wide) + (y.to(wide) if gate is None else gate.to(wide) * y.to(wide))).to(x.dtype)
    return x, modulated_layer_norm(x, scale, shift, eps)


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """(1 + scale) (x - mean) / sqrt(variance + eps) + shift over the last dimension, as in Wan's blocks (AdaLN).

    x: (B, T, D).  scale, shift: (B, 1, D), or (B, T, D) where every token has its own time.
    Computed in float32 at least, returned in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)) + shift.to(wide)).to(x.dtype)


def pooled_attention(
    tokens: Sequence[Tensor],
    embed: Tensor,
    queries: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    heads: int,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """softmax(q (h Wk^T)^T / sqrt(C)) (h Wv^T), per head: what learned queries gather from all tokens.

    h = scale * (n E^T), n the tokens after their LayerNorms (without weight and bias), channels side by side.
    tokens: each (B, T, D).  embed: (E, sum of D).  queries: (Q, K).  key_weight, value_weight: (K, E), as in
    ``nn.Linear``.  scale: (B, 1, E).  Returns (B, Q, K).
    """
    normed = [torch.nn.functional.layer_norm(x.to(embed.dtype), x.shape[-1:], eps=eps) for x in tokens]
    inside = torch.cat(normed, -1) @ embed.T
    if scale is not None:
        inside = inside * scale
    keys_BTHC = (inside @ key_weight.T).unflatten(-1, (heads, -1))
    values_BTHC = (inside @ value_weight.T).unflatten(-1, (heads, -1))
    queries_QHC = queries.unflatten(-1, (heads, -1))
    scores_BHQT = torch.einsum("qhc,bthc->bhqt", queries_QHC, keys_BTHC) / (queries.shape[-1] // heads) ** 0.5
    return torch.einsum("bhqt,bthc->bqhc", scores_BHQT.softmax(-1), values_BTHC).flatten(-2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + bias) v, per head.

    query: (B, T, H, C).  key, value: (B, S, H, C).  bias: (B, S), added to the logits.  scale: 1 / sqrt(C) if None.
    torch's own attention, whose mask has the query's dtype.  Returns (B, T, H, C).
    """
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2)
