"""The head of a latent reward: tokens of the frozen transformer in, one logit per named dimension out.

A learned query attends over every token of the video, and an MLP reads what it gathered.  Mean pooling is 1 point
worse in PRFL (arXiv 2511.21541), and 6 to 9 points worse on Wan in PRISM (arXiv 2606.20310).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.utils.errors import PrflError
from prfl_kernels.pooled_attention import pooled_attention, pooled_tokens

Pooling = Literal["query", "mean"]

FILM_FREQUENCIES = 32
EPS = 1e-5  # of the tokens' LayerNorms


def sigma_embedding(sigma: Float[Tensor, " b"]) -> Float[Tensor, "b e"]:
    """Compute sines and cosines of sigma, wavelengths from 2 down to 0.01: sigma 0.95 and 0.98 are far apart in it."""
    frequencies = torch.logspace(0, math.log10(200.0), FILM_FREQUENCIES, device=sigma.device, dtype=sigma.dtype)
    angles = math.pi * sigma[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def distinct(dimensions: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the reward dimensions as a tuple.  Raises PrflError for none, or for a name given twice."""
    if not dimensions or len(set(dimensions)) != len(dimensions):
        raise PrflError(
            f"the reward's dimensions are {list(dimensions)}",
            where="reward.head.dimensions",
            fix="give one or more distinct names",
        )
    return tuple(dimensions)


class RewardHead(nn.Module):
    """Maps features of one or more blocks, each (b, tokens, width), to logits (b, dimensions).

    width: hidden width of the transformer.  blocks: how many blocks' features come in; each is normalised on its
    own, then all are projected together to ``inner`` channels.  pooling: ``query`` (``n_queries`` learned queries,
    ``heads`` heads each) or ``mean``.  film: scale and shift the projected tokens by sigma; it starts as identity.
    Neither pooling depends on the order of the tokens: where a token lies is what the transformer wrote into it.
    """

    def __init__(
        self,
        width: int,
        dimensions: Sequence[str],
        *,
        blocks: int = 1,
        inner: int = 128,
        heads: int = 4,
        n_queries: int = 1,
        hidden: int = 256,
        pooling: Pooling = "query",
        film: bool = False,
    ) -> None:
        super().__init__()
        if inner % heads:
            raise PrflError(
                f"{inner} channels do not split over {heads} heads",
                where="reward.head",
                fix="let heads divide inner",
            )

        self.dimensions = distinct(dimensions)
        # What ``RewardHead(**settings)`` needs to be built again; it is what a saved head carries.
        self.settings: dict[str, object] = dict(
            width=width,
            dimensions=list(dimensions),
            blocks=blocks,
            inner=inner,
            heads=heads,
            n_queries=n_queries,
            hidden=hidden,
            pooling=pooling,
            film=film,
        )

        self.norms = nn.ModuleList([nn.LayerNorm(width, EPS) for _ in range(blocks)])
        self.project = nn.Linear(width * blocks, inner)
        self.film = nn.Linear(2 * FILM_FREQUENCIES, 2 * inner) if film else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

        self.pool = QueryPooling(inner, heads, n_queries) if pooling == "query" else MeanPooling()
        pooled = inner * n_queries if pooling == "query" else inner
        self.mlp = nn.Sequential(
            nn.LayerNorm(pooled),
            nn.Linear(pooled, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, len(dimensions)),
        )

    def forward(self, features: list[Float[Tensor, "b n d"]], sigma: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """Compute logits.  features: one tensor per block, any float dtype; computed in the head's.  sigma: (b,)."""
        assert len(features) == len(self.norms), f"built for {len(self.norms)} blocks, got {len(features)}"

        # The norms' weights and biases and all that follows up to the pooling is linear in the normalised tokens:
        # scale * (embed n) + constant.  So tokens are pooled first, and the rest is done to what was gathered.
        embed = self.project.weight * torch.cat([norm.weight for norm in self.norms])
        constant = self.project(torch.cat([norm.bias for norm in self.norms]))

        scale = None
        if self.film is not None:
            scale, shift = self.film(sigma_embedding(sigma.to(embed.dtype))).unsqueeze(1).chunk(2, dim=2)
            scale, constant = 1 + scale, constant * (1 + scale) + shift

        return self.mlp(self.pool(features, embed, constant, scale))


class QueryPooling(nn.Module):
    """Pools by attention: softmax(q (h W_K)^T / sqrt(d)) (h W_V) + q, per query.

    h = scale * (embed n) + constant, n the tokens after their LayerNorms.  Returns (b, queries * inner).
    """

    def __init__(self, inner: int, heads: int, n_queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(n_queries, inner) / math.sqrt(inner))
        self.key = nn.Linear(inner, inner)  # its bias changes nothing (softmax), and is there for the saved heads
        self.value = nn.Linear(inner, inner)

    def forward(
        self,
        features: list[Float[Tensor, "b n d"]],
        embed: Float[Tensor, "c e"],
        constant: Float[Tensor, "... c"],
        scale: Float[Tensor, "b 1 c"] | None,
    ) -> Float[Tensor, "b p"]:
        gathered = pooled_attention(
            features, embed, self.query, self.key.weight, self.value.weight, self.heads, scale, EPS
        )
        unseen = 0 * self.key.bias  # has a gradient, zero, as it always had: optimizer states stay what they are
        return (gathered + self.value(constant) + self.query + unseen).flatten(1)


class MeanPooling(nn.Module):
    """Pools by the mean over tokens: the baseline that a learned query has to beat.  Returns (b, inner)."""

    def forward(
        self,
        features: list[Float[Tensor, "b n d"]],
        embed: Float[Tensor, "c e"],
        constant: Float[Tensor, "... c"],
        scale: Float[Tensor, "b 1 c"] | None,
    ) -> Float[Tensor, "b c"]:
        width = embed.shape[1]
        gathered = pooled_tokens(features, embed.new_zeros(len(features[0]), 1, width), EPS) @ embed.T
        return (gathered * (1 if scale is None else scale) + constant).squeeze(1)
