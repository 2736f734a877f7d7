"""Learned queries that attend over all tokens of a video, without keys, values or normalised tokens.

Everything between a token and its key or value is linear but for the LayerNorm, n_t = r_t (x_t - mean(x_t)):

    scores   q . Wk E n_t = r_t (E^T Wk^T q) . (x_t - mean(x_t))
    output   sum_t p_t Wv E n_t = Wv E (sum_t p_t r_t (x_t - mean(x_t)))

so tokens are met by one vector a query and head, and no tensor as large as they are is made but their gradient.  (The
mean could move to the query as well, (u - mean(u)) . x_t; in float32 that loses digits where tokens have a mean.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 22  # elements of the tokens that are met at a time: 16 MiB in float32


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
    """Compute softmax(q (h Wk^T)^T / sqrt(C)) (h Wv^T), per head, of h = scale * (n E^T), n the tokens after LayerNorm.

    What is added to h or to the values anywhere adds Wv of it to the result, and what is added to keys does nothing:
    neither is taken here.  Exact: other than rounding it changes nothing (Q queries, H heads, C = K / H).

    tokens: each (B, T, D), any float type; every one has a LayerNorm (without weight and bias) of its own, and their
    channels then stand side by side.  embed: (E, sum of D).  queries: (Q, K).  key_weight, value_weight: (K, E).
    scale: (B, 1, E).  All but the tokens in one type, which is computed in, float32 at least.
    Returns (B, Q, K) in that type.  Raises ValueError where heads does not divide K.
    """
    if queries.shape[-1] % heads:
        raise ValueError(f"heads ({heads}) must divide the width ({queries.shape[-1]})")

    # Queries, brought back through the keys' weights: one direction of h for each query and head (N = Q H).
    batch = tokens[0].shape[0]
    queries_QHC = queries.unflatten(-1, (heads, -1)) * (queries.shape[-1] // heads) ** -0.5
    directions_HQE = torch.einsum("qhc,hce->hqe", queries_QHC, key_weight.unflatten(0, (heads, -1)))
    directions_BNE = directions_HQE.flatten(0, 1).expand(batch, -1, -1)
    if scale is not None:
        directions_BNE = directions_BNE * scale

    # Tokens are gathered as they are, and only then embedded and made values.
    gathered_BND = pooled_tokens(tokens, directions_BNE @ embed, eps)
    gathered_BNE = gathered_BND @ embed.T
    if scale is not None:
        gathered_BNE = gathered_BNE * scale

    values_HCE = value_weight.unflatten(0, (heads, -1))
    return torch.einsum("bhqe,hce->bqhc", gathered_BNE.unflatten(1, (heads, -1)), values_HCE).flatten(2)


def pooled_tokens(tokens: Sequence[Tensor], directions: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute sum_t p_t n_t, p = softmax over t of (directions n_t), n the tokens after LayerNorms, side by side.

    tokens: each (B, T, D), any float type and strides.  directions: (B, N, sum of D).  Returns (B, N, sum of D) in
    directions' type; computed in float32 at least.  For the backward pass the tokens and N + 2 numbers a token are
    kept.
    """
    wide = torch.promote_types(directions.dtype, torch.float32)
    return _PooledTokens.apply(directions.to(wide), eps, *tokens).to(directions.dtype)


class _PooledTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, directions: Tensor, eps: float, *tokens: Tensor) -> Tensor:
        batch, length, _ = tokens[0].shape
        scores = directions.new_zeros(batch, length, directions.shape[1])
        statistics = []
        for x, part in zip(tokens, _parts(directions, tokens), strict=True):
            mean, rstd = directions.new_empty(2, batch, length, 1)
            for chunk in _chunks(x):
                variance, mean[:, chunk] = torch.var_mean(x[:, chunk].to(mean.dtype), -1, correction=0, keepdim=True)
                rstd[:, chunk] = (variance + eps).rsqrt()
                scores[:, chunk] += rstd[:, chunk] * ((x[:, chunk] - mean[:, chunk]) @ part.mT)
            statistics += [mean, rstd]

        gathered = _gather(tokens, statistics, scores.softmax(1))
        ctx.save_for_backward(directions, gathered, scores, *statistics, *tokens)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        directions, gathered, scores, *rest = ctx.saved_tensors
        statistics, tokens = rest[: len(rest) // 3 * 2], rest[len(rest) // 3 * 2 :]
        grad_parts, direction_parts = _parts(grad, tokens), _parts(directions, tokens)

        # Softmax's backward.
        weights, d_weights = scores.softmax(1), torch.zeros_like(scores)
        for x, mean, rstd, part in zip(tokens, statistics[::2], statistics[1::2], grad_parts, strict=True):
            for chunk in _chunks(x):
                d_weights[:, chunk] += rstd[:, chunk] * ((x[:, chunk] - mean[:, chunk]) @ part.mT)
        d_scores = weights * (d_weights - (grad * gathered).sum(-1)[:, None])

        d_directions = _gather(tokens, statistics, d_scores) if ctx.needs_input_grad[0] else None

        # A token is gathered with its weight, and scored along the directions: two ways to the result.
        both = torch.cat([weights, d_scores], -1)
        d_tokens: list[Tensor | None] = [None] * len(tokens)
        for i, x in enumerate(tokens):
            if ctx.needs_input_grad[2 + i]:
                rows = torch.cat([grad_parts[i], direction_parts[i]], 1)
                d_tokens[i] = _token_gradient(x, statistics[2 * i], statistics[2 * i + 1], both, rows)
        return d_directions, None, *d_tokens


def _token_gradient(x: Tensor, mean: Tensor, rstd: Tensor, both: Tensor, rows: Tensor) -> Tensor:
    """Compute LayerNorm's backward of dn = both rows: r (dn - mean(dn) - n mean(dn n)), whose two means need no dn.

    both: (B, T, 2 N), p and ds.  rows: (B, 2 N, D), the output's gradient and the directions.
    """
    result, width = torch.empty_like(x), x.shape[-1]
    rows = rows - rows.mean(-1, keepdim=True)
    for chunk in _chunks(x):
        centred, r = x[:, chunk] - mean[:, chunk], rstd[:, chunk]
        share = r**3 * (both[:, chunk] * (centred @ rows.mT)).sum(-1, keepdim=True) / width
        result[:, chunk] = ((r * both[:, chunk]) @ rows).addcmul_(share, centred, value=-1)
    return result


def _gather(tokens: Sequence[Tensor], statistics: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum weights n over t.  weights: (B, T, N).  Returns (B, N, sum of D)."""
    totals = []
    for x, mean, rstd in zip(tokens, statistics[::2], statistics[1::2], strict=True):
        totals.append(weights.new_zeros(len(x), weights.shape[-1], x.shape[-1]))
        for chunk in _chunks(x):
            totals[-1] += (weights[:, chunk] * rstd[:, chunk]).mT @ (x[:, chunk] - mean[:, chunk])
    return torch.cat(totals, -1)


def _parts(rows: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split rows (.., sum of D) into those of each of the tokens."""
    return rows.split([x.shape[-1] for x in tokens], -1)


def _chunks(x: Tensor) -> list[slice]:
    """Slice the tokens.  A slice minus its mean is made in float32, and is all that is made of tokens at a time."""
    step = max(1, CHUNK // (x.shape[0] * x.shape[2]))
    return [slice(start, min(start + step, x.shape[1])) for start in range(0, x.shape[1], step)]
