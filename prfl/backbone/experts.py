"""Two networks that share a chain: one predicts at high noise, the other at low noise.

The first predicts where sigma is the boundary or above it.  diffusers' pipelines compare float32 timesteps, and so is
it decided here: at shift 3 and 40 steps a node lies on the boundary 0.875, in float64 a hair below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prfl.backbone.base import Facts
from prfl.backbone.condition import Condition
from prfl.backbone.dropout import dropouts
from prfl.backbone.pipeline import PipelineBackbone

HIGH, LOW = "high", "low"
"""What users call the two."""


def expert_networks(facts: Facts) -> dict[str, str]:
    """The network of each expert: ``{"high": "transformer", "low": "transformer_2"}``; empty for other models."""
    return {} if facts.boundary is None else dict(zip((HIGH, LOW), facts.blocks, strict=True))


def is_high(facts: Facts, sigma: Float[Tensor, "*sigma"]) -> Bool[Tensor, "*sigma"]:
    """Whether the expert for high noise predicts at each sigma."""
    assert facts.boundary is not None, "the model has no two experts"
    timestep_of_one = facts.schedule[1]
    return sigma.float() * timestep_of_one >= facts.boundary * timestep_of_one


class Experts(PipelineBackbone):
    """Put before a family's class: each call runs the network of its sigma, and a batch on both sides both of them."""

    def velocity(
        self, latents: Float[Tensor, "b c t h w"], sigma: Float[Tensor, "*sigma"], condition: Condition
    ) -> Float[Tensor, "b c t h w"]:
        call = super().velocity  # type: ignore[safe-super]
        (velocity,) = self._routed(lambda x, level, prompts: [call(x, level, prompts)], latents, sigma, condition)
        return velocity

    def features(
        self,
        latents: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "*sigma"],
        condition: Condition,
        blocks: Sequence[int],
    ) -> list[Float[Tensor, "b tokens width"]]:
        call = super().features  # type: ignore[safe-super]
        return self._routed(lambda x, level, prompts: call(x, level, prompts, blocks), latents, sigma, condition)

    def _routed(
        self, call: Callable[..., list[Tensor]], latents: Tensor, sigma: Tensor, condition: Condition
    ) -> list[Tensor]:
        """What ``call`` gives for latents, sigma and condition, each sample's by the network of its sigma."""
        rows = self.rows_of_networks(sigma, len(latents))
        if len(rows) == 1:
            with self._by(next(iter(rows))):
                return call(latents, sigma, condition)
        parts = []
        for name, chosen in rows.items():
            # Masks are of the whole batch, in backward too: then every sample is computed, and the others' left.
            masked = any(layer.seeds is not None for layer in dropouts(self.computing[name]))
            with self._by(name):
                if masked:
                    parts.append([state[chosen] for state in call(latents, sigma, condition)])
                else:
                    parts.append(call(latents[chosen], sigma[chosen], condition[chosen]))
        order = torch.tensor([row for chosen in rows.values() for row in chosen]).argsort().to(latents.device)
        return [torch.cat(states)[order] for states in zip(*parts, strict=True)]

    def rows_of_networks(self, sigma: Tensor, batch: int) -> Mapping[str, list[int]]:
        """The samples that each network computes; those that have none are left out."""
        high, low = expert_networks(self.facts).values()
        if sigma.is_meta:  # no number, and networks of one shape
            return {low: list(range(batch))}
        above = is_high(self.facts, sigma).expand(batch).tolist()
        rows = {high: [row for row in range(batch) if above[row]], low: [row for row in range(batch) if not above[row]]}
        return {name: chosen for name, chosen in rows.items() if chosen}

    @contextmanager
    def _by(self, name: str) -> Iterator[None]:
        """Compute by this network."""
        before, self.at = self.at, name
        try:
            yield
        finally:
            self.at = before
