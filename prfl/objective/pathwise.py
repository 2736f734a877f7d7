"""The two-phase step that every reward-gradient method shares: rollout, score, walk back.

A method says only which plan and which node (``Choice``); this is how it is carried out:

1. rollout without autograd under the policy's adapter, as far as the choice needs;
2. the reward on detached latents, its gradient there (the seed), and everything it held is freed;
3. the walk back along the plan, under the policy's adapter again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prfl import draws
from prfl.backbone.condition import Condition
from prfl.backbone.wan import WanBackbone
from prfl.errors import PrflError
from prfl.objective.clock import Clock
from prfl.objective.distance import accumulate_distance, velocity_distance
from prfl.objective.order import shuffled
from prfl.objective.scorer import RewardLoss, Scorer, reward_gradient
from prfl.offload import HostStore
from prfl.rollout import Network, Plan, Trajectory, guided_network, hold_edge, rollout, target_latents, walk_back
from prfl.solvers import Coefficients


@dataclass(frozen=True)
class Choice:
    """What one optimizer step differentiates: a plan, and the node at which the reward is read."""

    plan: Plan
    node: int

    @property
    def sources(self) -> frozenset[int]:
        """The latents that the walk back starts its network calls from."""
        return self.plan.evaluations | {edge.source for edge in self.plan.edges}

    @property
    def sigma(self) -> float:
        """Noise level at the node."""
        return next(edge.sigma for edge in self.plan.edges if edge.target == self.node)


@runtime_checkable
class Method(Protocol):
    """A reward-gradient method.  The choice is shared by the whole batch: a function of (seed, step)."""

    @property
    def coefficients(self) -> Coefficients: ...

    @property
    def noisy(self) -> bool:
        """Whether it ever reads the reward at sigma > 0."""
        ...

    def choose(self, step: int) -> Choice: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance while training: see ``rollout.guidance``."""

    scale: float = 1.0
    gradient: Literal["none", "cond", "both"] = "none"


@dataclass
class Pathwise:
    """An objective: a method, a reward (by its scorer), a loss shape, and the policy's adapter.

    latent_shape: (c, t, h, w).  distance_weight: weight of the velocity's mean squared distance to the base at the
    states the step trains at; with weight 0 it is only measured, every ``distance_every`` steps (0 = never).
    reward_batch: samples scored at once; None is all.
    Raises PrflError for a reward that the method cannot use.
    """

    backbone: WanBackbone
    method: Method
    scorer: Scorer
    loss: RewardLoss
    prompts: Sequence[str]
    latent_shape: tuple[int, int, int, int]
    seed: int
    adapter: str = "policy"
    guidance: Guidance = Guidance()
    distance_weight: float = 0.0
    distance_every: int = 10
    reward_batch: int | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PrflError("there are no prompts to train on", where="data.prompts.train", fix="give at least one")
        if not self.scorer.differentiable:
            raise PrflError(
                "this method follows the reward's gradient, and the reward has none",
                where="reward",
                fix="take a differentiable reward",
            )
        if self.method.noisy and not self.scorer.noise_aware:
            raise PrflError(
                "the reward is read at noisy latents, and it is not noise-aware",
                where="reward",
                fix="take a latent reward, or objective.handoff: clean, which scores clean predictions",
            )

        self.backbone.remember(["", *self.prompts])

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.backbone.adapter_parameters(self.adapter)

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        clock = Clock(self.backbone.device)
        choice = self.method.choose(step)
        with clock("condition"):
            _, condition, start = self.draw(step, indices)
            network = self.network(condition)
        parameters = list(self.parameters().values())
        held_edge = holds_edge(self.backbone, choice)
        with clock("rollout"), self.backbone.adapter(self.adapter):
            trajectory = self.roll(network, start, choice, held_edge)
            held = hold_edge(network, trajectory, choice.plan, parameters) if held_edge else None
            latents = held.latents if held else scored_latents(network, trajectory, choice)
        numbers = {"latents/max": float(latents.abs().max())}  # the trainer stops where it is not finite
        with clock("reward"):
            sigma = torch.tensor(choice.sigma, device=latents.device, dtype=torch.float32)
            seed, metrics = reward_gradient(
                self.scorer, self.loss, latents, sigma, condition, step, at_once=self.reward_batch
            )
        with clock("backward"), self.backbone.adapter(self.adapter):
            if held:
                held.backward(seed)
            else:
                walk_back(network, trajectory, choice.plan, {choice.node: seed}, parameters)
        with clock("distance"):
            metrics |= self.distance(step, trajectory, choice, condition)
        chosen = {"sampled_step": float(min(choice.plan.trains)), "node": float(choice.node), "sigma": choice.sigma}
        return metrics | numbers | chosen | clock.metrics()

    def draw(self, step: int, indices: Sequence[int]) -> tuple[list[str], Condition, Tensor]:
        """Prompts, their condition and the start noise of these samples."""
        prompts = [self.prompts[i] for i in shuffled(indices, len(self.prompts), self.seed, "prompts")]
        condition = self.backbone.condition(prompts)
        start = draws.normal(self.latent_shape, self.seed, "start", step, indices)
        return prompts, condition, start.to(self.backbone.device)

    def network(self, condition: Condition) -> Network:
        scale, empty = self.guidance.scale, None
        if scale != 1:
            empty = self.backbone.condition([""] * len(condition))
        return guided_network(self.backbone.velocity, condition, empty, scale=scale, gradient=self.guidance.gradient)

    def roll(self, network: Network, start: Tensor, choice: Choice, held_edge: bool) -> Trajectory:
        """The chain up to the node that is scored, or up to where the last edge leaves it."""
        last = last_rolled(choice, self.method.coefficients, held_edge)
        store = HostStore() if self.backbone.offload else None
        return rollout(network, start, self.method.coefficients, last=last, keep=choice.sources, store=store)

    def distance(self, step: int, trajectory: Trajectory, choice: Choice, condition: Condition) -> dict[str, float]:
        """Mean over the trained states of mean (v_policy - v_base)^2; its gradient is added where it has a weight."""
        states = [(trajectory.at(k), self.method.coefficients.sigmas[k]) for k in sorted(choice.plan.trains)]
        if self.distance_weight:
            value = accumulate_distance(self.backbone, self.adapter, states, condition, self.distance_weight)
        elif self.distance_every and step % self.distance_every == 0:
            value = velocity_distance(self.backbone, self.adapter, states, condition)
        else:
            return {}
        return {"distance": value}

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The batch as it was drawn, and its latents rolled out anew."""
        prompts, condition, start = self.draw(step, indices)
        choice = self.method.choose(step)
        network = self.network(condition)
        with self.backbone.adapter(self.adapter):
            trajectory = self.roll(network, start, choice, held_edge=False)
            scored = scored_latents(network, trajectory, choice)
        facts = {"prompts": prompts, "node": choice.node, "sigma": choice.sigma, "trains": sorted(choice.plan.trains)}
        return {"start": start, "scored": scored}, facts


def holds_edge(backbone: WanBackbone, choice: Choice) -> bool:
    """One edge under checkpointing: its graph is small, so it is kept rather than run again for the walk."""
    return backbone.checkpointing != "none" and len(choice.plan.edges) == 1


def last_rolled(choice: Choice, coefficients: Coefficients, held_edge: bool) -> int:
    """The node at which the rollout ends, and so its number of steps."""
    return choice.node if choice.node <= coefficients.steps and not held_edge else max(choice.sources)


def scored_latents(network: Network, trajectory: Trajectory, choice: Choice) -> Tensor:
    """The latents at the choice's node; a clean prediction, which the chain does not visit, is computed."""
    if choice.node <= trajectory.coefficients.steps:
        return trajectory.at(choice.node)
    (edge,) = (edge for edge in choice.plan.edges if edge.target == choice.node)
    return target_latents(network, trajectory, edge)
