"""Two networks that share a chain: one predicts at high noise, the other at low noise.

The first predicts where sigma is the boundary or above it.  diffusers' pipelines compare float32 timesteps, and so is
it decided here: at shift 3 and 40 steps a node lies on the boundary 0.875, in float64 a hair below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prfl.backbone.base import Facts
from prfl.backbone.condition import Condition
from prfl.backbone.dropout import dropouts
from prfl.backbone.family import FIRST_NETWORKS, LoraFile
from prfl.backbone.network import blocks_of_each, predictors
from prfl.backbone.pipeline import PipelineBackbone
from prfl.backbone.turns import Turns
from prfl.utils.errors import PrflError

HIGH, LOW = "high", "low"
"""What users call the two."""


def expert_networks(facts: Facts) -> dict[str, str]:
    """The network of each expert: ``{"high": "transformer", "low": "transformer_2"}``; empty for other models."""
    return {} if facts.boundary is None else dict(zip((HIGH, LOW), facts.blocks, strict=True))


def loras_by_network(lora: Path | Mapping[str, Path], form: LoraFile) -> dict[str, Path]:
    """The LoRA file of each network, where ``lora`` is one file, or one of each expert by its name.

    Raises PrflError for one file where there are two experts, and for files of experts where there are none.
    """
    if not form.of_networks:
        if isinstance(lora, Path):
            return dict.fromkeys(FIRST_NETWORKS, lora)
        raise PrflError("the model has one network, and no experts for high and low noise", fix="give one file")
    if isinstance(lora, Path):
        what = "the model has two networks, of the experts for high and low noise, and this is one file"
        raise PrflError(what, fix="{high: FILE, low: FILE}, or one of them; of a run those that `prfl export` writes")
    networks = dict(zip((HIGH, LOW), form.of_networks, strict=True))
    if strange := [name for name in lora if name not in networks]:
        raise PrflError(f"there is no expert '{strange[0]}'", fix="name them high and low")
    return {networks[name]: file for name, file in lora.items()}


def key_of_lora(key: str, form: LoraFile, network: str) -> str:
    """The yaml path of a network's LoRA file, where ``key`` is that of all of them."""
    experts = dict(zip(form.of_networks, (HIGH, LOW), strict=False))
    return f"{key}.{experts[network]}" if network in experts else key


def expert_of(facts: Facts, parameter: str) -> str:
    """Which expert a parameter is of, by its name (``Backbone.parameters``); "" in other models."""
    network = parameter.partition(".")[0]
    names = {name: expert for expert, name in expert_networks(facts).items()}
    return names.get(network, next(iter(names.values()), ""))


def is_high(facts: Facts, sigma: Float[Tensor, "*sigma"]) -> Bool[Tensor, "*sigma"]:
    """Whether the expert for high noise predicts at each sigma."""
    assert facts.boundary is not None, "the model has no two experts"
    timestep_of_one = facts.schedule[1]
    return sigma.float() * timestep_of_one >= facts.boundary * timestep_of_one


def networks_read(facts: Facts) -> tuple[str, ...] | None:
    """The networks whose hidden states a reward reads: the expert's for low noise, where two take turns; None is all.

    The two have statistics of their own, and high up a head ranks hardly better than chance anyway.
    """
    return (expert_networks(facts)[LOW],) if facts.boundary is not None else None


def highest_read(facts: Facts) -> float:
    """The noise level up to which a reward reads latents."""
    if facts.boundary is None:
        return 1.0
    below = torch.tensor(facts.boundary, dtype=torch.float32)
    while bool(is_high(facts, below)):
        below = torch.nextafter(below, torch.zeros(()))
    return float(below)


def lowest_of_high(facts: Facts) -> float:
    """The lowest noise level at which the expert for high noise predicts."""
    above = torch.tensor(highest_read(facts), dtype=torch.float32)
    while not bool(is_high(facts, above)):
        above = torch.nextafter(above, torch.ones(()))
    return float(above)


def check_read(facts: Facts, sigma: Tensor) -> None:
    """Raise PrflError for a noise level at which the expert for high noise predicts: no reward reads that one."""
    if facts.boundary is None or sigma.is_meta or not bool(is_high(facts, sigma).any()):
        return
    what = f"the reward reads the low-noise expert, below sigma {facts.boundary:g}, and is asked at {sigma.max():.4g}"
    fix = "objective.handoff: clean, which reads the clean prediction, a later objective.steps_range, or a method that "
    fix += "reads the chain's end (full_chain): its gradient reaches the high-noise expert too"
    raise PrflError(what, where="reward", fix=fix)


class Experts(PipelineBackbone):
    """Put before a family's class: each call runs the network of its sigma, and a batch on both sides both of them."""

    _chosen = False

    def take_turns(self) -> None:
        """Let the blocks' frozen weights, which are on the host, come to the device when their network computes."""
        self.running.turns = Turns(predictors(self), blocks_of_each(self), self.facts.device)

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
        if self._chosen:  # features are read during a call of velocity
            return call(latents, sigma, condition)
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
        if self.running.turns is not None:
            self.running.turns.bring(name)
        before, self.at, self._chosen = self.at, name, True
        try:
            yield
        finally:
            self.at, self._chosen = before, False
