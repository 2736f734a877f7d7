"""Plain torch, in the order of the formula: the path that runs without a kernel, and what a kernel is tested against.

Shape suffixes: B batch, T tokens, D width, Q queries, H heads, C = D / H channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """(1 + scale) (x - mean) / sqrt(variance + eps) + shift over the last dimension, as in Wan's blocks (AdaLN).

    x: (B, T, D).  scale, shift: (B, 1, D), or (B, T, D) where every token has its own time.
    Computed in float32 at least, returned in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + scale.to(wide)) + shift.to(wide)).to(x.dtype)


def pooled_attention(tokens: Tensor, queries: Tensor, key_weight: Tensor, value_weight: Tensor, heads: int) -> Tensor:
    """softmax(q (x Wk^T)^T / sqrt(C)) (x Wv^T), per head: what learned queries gather from all tokens.

    tokens: (B, T, D).  queries: (Q, D).  key_weight, value_weight: (D, D), as in ``nn.Linear``.  Returns (B, Q, D).
    """
    width = tokens.shape[-1]
    if width % heads:
        raise ValueError(f"heads ({heads}) must divide the width ({width})")
    keys_BTHC = (tokens @ key_weight.T).unflatten(-1, (heads, -1))
    values_BTHC = (tokens @ value_weight.T).unflatten(-1, (heads, -1))
    queries_QHC = queries.unflatten(-1, (heads, -1))
    scores_BHQT = torch.einsum("qhc,bthc->bhqt", queries_QHC, keys_BTHC) / (width // heads) ** 0.5
    return torch.einsum("bhqt,bthc->bqhc", scores_BHQT.softmax(-1), values_BTHC).flatten(-2)
