"""The two-phase step that every reward-gradient method shares: rollout, reward, adjoint.

A method only says which plan, which seeds and where the chain starts (``StepPlan``).  This module carries it out:

1. rollout without autograd under the policy's adapter, as far as the plan needs;
2. the reward on detached latents, node by node: its gradient there is the seed, and its activations are freed;
3. the adjoint along the plan, under the policy's adapter again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT, Cheaper
from prfl.backbone.condition import Condition, unconditional, with_unconditional
from prfl.backbone.guidance_scale import scale_at
from prfl.backbone.kernels import cheaper_calls
from prfl.data.conditions import recall, remember
from prfl.data.dataset import LatentDataset
from prfl.objective.distance import (
    DistanceTerm,
    accumulate_distance,
    shares_call,
    trained_states,
    velocity_distance,
)
from prfl.objective.loss import RewardLoss, loss_gradient, seed_gradients
from prfl.objective.methods.base import Method
from prfl.objective.methods.leapalign import leap_similarity
from prfl.objective.reused_rollout import FreshRollout, ReusedRollout
from prfl.reward.scorer import Scorer
from prfl.rollout import adjoint
from prfl.rollout.guidance import Guidance, guided_network
from prfl.rollout.plan import Node, Renoised, StepPlan, node_number, order, unit_steps
from prfl.rollout.requirements import requirements
from prfl.rollout.solvers import SolverSchedule, renoised
from prfl.rollout.trajectory import Network, Trajectory, rollout
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore
from prfl.utils.order import PROMPTS, shuffled
from prfl.utils.timing import Clock


@dataclass
class RewardGradient:
    """An objective: a method, a reward (by its scorer), a loss shape, and the policy's adapter.

    latent_shape: (c, t, h, w).
    distance_weight: weight of the mean squared distance between the policy's and the base's velocity, at the states
    where the step trains.  With weight 0 the distance is only measured, every ``distance_every`` steps (0: never).
    step_weight: ``native`` leaves each trained step's gradient in proportion to |sigma[m+1] - sigma[m]|, which varies
    22-fold over Wan's chain; ``unit`` makes all steps weigh alike.
    clips: the data's clips, for methods whose chains start from noised clips; None where all start from noise.
    reward_batch: samples scored at once; None is all.
    stride: the rollout takes this many steps in one leap where no node between them is needed (``requirements``).
    rollouts: whether each optimizer step draws a rollout, or several share one.  Sharing needs chains that start from
    noise and edges that are trained one at a time.
    cheaper: how the rollout computes the network calls that are not trained (``exact_nodes`` names the others).
    expected: the prompts that will be drawn, which are encoded now; None is all of them.
    Raises PrflError for a reward that the method cannot use.
    """

    backbone: Backbone
    method: Method
    scorer: Scorer
    loss: RewardLoss
    prompts: Sequence[str]
    latent_shape: tuple[int, ...]
    adapter: str = "policy"
    guidance: Guidance = Guidance()
    distance_weight: float = 0.0
    distance_every: int = 50
    step_weight: Literal["native", "unit"] = "native"
    clips: LatentDataset | None = None
    reward_batch: int | None = None
    stride: int = 1
    rollouts: FreshRollout | ReusedRollout = field(default_factory=FreshRollout)
    cheaper: Cheaper = EXACT
    expected: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise PrflError("there are no prompts to train on", where="data.prompts.train", fix="give at least one")
        if not self.scorer.differentiable:
            what = "this method follows the reward's gradient, and the reward has none"
            raise PrflError(what, where="reward", fix="take a differentiable reward")
        if self.method.noisy and not self.scorer.noise_aware:
            raise PrflError(
                "the reward is read at noisy latents, and it is not noise-aware",
                where="reward",
                fix="take a latent reward, or objective.handoff: clean, which scores clean predictions",
            )
        remember(self.backbone, with_unconditional(self.prompts if self.expected is None else self.expected))
        if self.clips is not None and self.clips.first_frames:
            recall(self.backbone, self.clips.conditions)  # each clip has an unconditional one of its own

    @property
    def schedule(self) -> SolverSchedule:
        return self.method.schedule

    @property
    def seed(self) -> int:
        return self.method.seed

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.backbone.parameters(self.adapter)

    def plan(self, step: int) -> StepPlan:
        step_plan = self.method.plan(step)
        if self.step_weight == "native":
            return step_plan
        return replace(step_plan, plan=unit_steps(self.schedule, step_plan.plan))

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """See ``Objective``."""
        clock = Clock(self.backbone.facts.device)
        step_plan, parameters = self.plan(step), list(self.parameters().values())
        origin = self.origin(step, indices)
        masks = self.masks(*origin)
        with clock("condition"):
            _, condition, start = self.draw(*origin)
            network = self.network(condition)

        # 1. Rollout without autograd.  If there is one edge and its graph is small, the graph is made here and kept.
        graph = None
        with clock("rollout"), self.policy(masks):
            trajectory = self.trajectory(network, start, step, indices)
            if retains_graph(self.backbone, step_plan):
                graph = adjoint.retain_graph(network, trajectory, step_plan.plan, parameters)
                scored = {step_plan.node: graph.latents}
            else:
                scored = self.rollouts.scored(network, trajectory, step_plan)
            weights = leap_similarity(network, trajectory, step_plan) if step_plan.similarity else None
            metrics = {} if trajectory.cached is None else {"rollout/cached": trajectory.cached}
            metrics |= self.rollouts.metrics(network, scored, step_plan, step, indices)
        largest = max(float(x.abs().max()) for x in scored.values())  # the trainer stops if it is not finite

        # 2. The reward's gradient at these latents is the adjoint's seed.
        with clock("reward"):
            seeds, rewards = self.score(scored, step_plan, condition, step, weights)

        # 3. Adjoint, one network call at a time.
        shared = self.distance_weight > 0 and shares_call(self.backbone, self.adapter, step_plan, self.guidance.scale)
        term = DistanceTerm(self.backbone, condition, self.distance_weight) if shared else None
        with clock("backward"), self.policy(masks):
            if graph:
                graph.backward(seeds[step_plan.node], term)
            else:
                adjoint.backward(network, trajectory, step_plan.plan, seeds, parameters, term)

        with clock("distance"):
            distance = {"distance": term.value} if term else self.distance(step, trajectory, step_plan, condition)
            metrics |= rewards | distance
        return metrics | {"latents/max": largest} | self.facts(step_plan) | clock.metrics()

    def facts(self, step_plan: StepPlan) -> dict[str, float]:
        """Return the trained step and the scored node, for the log."""
        steps, first_trained = self.schedule.steps, min(step_plan.plan.trains, key=order)
        facts = {"sampled_step": float(node_number(first_trained, steps))}
        if self.clips:  # rewards of noised clips and of the policy's own chains are not alike
            facts["from_data"] = float(step_plan.first > 0)
        return facts | {"node": float(node_number(step_plan.node, steps)), "sigma": step_plan.sigma(step_plan.node)}

    def masks(self, step: int, indices: Sequence[int]) -> Int[Tensor, " b"]:
        """Return the dropout seeds of the samples: one mask for each, the same in rollout, edges and adjoint."""
        return rng.seeds(self.seed, "dropout/policy", step, indices).to(self.backbone.facts.device)

    def policy(self, masks: Int[Tensor, " b"]) -> AbstractContextManager:
        """Select the policy's adapter, with these dropout masks."""
        return self.backbone.adapter(self.adapter, masks)

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Return the step whose rollout is used, and the indices that these samples had in it."""
        self.rollouts.begin(step, self.parameters())
        return self.rollouts.origin(step, indices)

    def draw(self, step: int, indices: Sequence[int]) -> tuple[list[str], Condition, Float[Tensor, "b c t h w"]]:
        """Draw the samples' prompts, condition and start: noise, or noised clips of the data."""
        noise = rng.normal(self.latent_shape, self.seed, "start", step, indices).to(self.backbone.facts.device)
        first = self.method.plan(step).first
        if first == 0:
            prompts = [self.prompts[i] for i in shuffled(indices, len(self.prompts), self.seed, PROMPTS)]
            remember(self.backbone, with_unconditional(prompts))  # encodes those that were not expected
            condition = self.backbone.condition(prompts)
            return prompts, condition, self.backbone.start(noise, condition, float(self.schedule.sigmas[0]))

        if self.clips is None:
            what = "the method's chains start from clips of the data, and there are none"
            raise PrflError(what, where="data", fix="give data.manifest or data.generator")
        clips = self.clips.get(shuffled(indices, len(self.clips), self.seed, "clips"))
        return clips.prompts, clips.condition, renoised(self.schedule, first, clips.latents.to(noise), noise)

    def noises(self, step: int, indices: Sequence[int]) -> rng.ChainNoises:
        """Return the noise of a stochastic solver's steps for these samples."""
        return rng.ChainNoises(self.latent_shape, self.seed, step, indices)

    def network(self, condition: Condition) -> Network:
        """Return the policy's guided velocity of these samples."""
        scale, empty = scale_at(self.backbone.facts, self.guidance.scale), None
        if scale != 1:
            empty = self.backbone.condition(unconditional(condition.asks))
        return guided_network(self.backbone.velocity, condition, empty, scale=scale, gradient=self.guidance.gradient)

    def trajectory(
        self, network: Network, start: Float[Tensor, "b c t h w"], step: int, indices: Sequence[int]
    ) -> Trajectory:
        """Return the step's trajectory: rolled out for it, or its part of a rollout that several steps share."""
        return self.rollouts.trajectory(partial(self.roll, network, start), self.plan, self.parameters(), step, indices)

    def roll(
        self,
        network: Network,
        start: Float[Tensor, "b c t h w"],
        plans: Sequence[StepPlan],
        step: int,
        indices: Sequence[int],
    ) -> Trajectory:
        """Roll out the samples of ``step`` as far as ``plans`` need: its own plan, and those of steps that share it."""
        first, reused = plans[0], self.rollouts.reused
        needs = requirements(plans, self.schedule, self.stride, retains_graph(self.backbone, first), reused)
        calls = None if self.cheaper == EXACT else cheaper_calls(self.backbone, self.cheaper, needs.exact)

        trajectory = rollout(
            network,
            start,
            self.schedule,
            first=first.first,
            last=needs.path[-1],
            visits=needs.path,
            noises=self.noises(step, indices),
            keep=needs.latents,
            keep_outputs=needs.outputs,
            store=HostStore() if reused or self.backbone.running.offload else None,
            at=calls.at if calls else None,
        )
        beside = self.renoise(trajectory, first, step, indices)
        return replace(trajectory, renoised=beside, cached=calls.cached if calls else None)

    def renoise(
        self, trajectory: Trajectory, step_plan: StepPlan, step: int, indices: Sequence[int]
    ) -> dict[Renoised, Float[Tensor, "b c t h w"]]:
        """Noise the chain's end again, for the plan's nodes beside the chain (``Renoised``)."""
        states = {}
        for node in step_plan.renoised:
            clean = trajectory.at(self.schedule.steps)
            name = f"noised/{node_number(node, self.schedule.steps)}"
            noise = rng.normal(self.latent_shape, self.seed, name, step, indices).to(clean)
            states[node] = renoised(self.schedule, node.i, clean, noise)
        return states

    def score(
        self,
        scored: Mapping[Node, Float[Tensor, "b c t h w"]],
        step_plan: StepPlan,
        condition: Condition,
        step: int,
        weights: Float[Tensor, " b"] | None,
    ) -> tuple[dict[Node, Float[Tensor, "b c t h w"]], dict[str, float]]:
        """Score the latents: return the seeds, and the metrics' means.  weights: of each sample's loss; None is 1."""
        read = partial(loss_gradient, self.scorer, self.loss, condition=condition, step=step, at_once=self.reward_batch)
        return seed_gradients(read, scored, step_plan, weights)

    def distance(
        self, step: int, trajectory: Trajectory, step_plan: StepPlan, condition: Condition
    ) -> dict[str, float]:
        """Measure the mean (v_policy - v_base)^2 at the trained states; with ``distance_weight``, add its gradient."""
        states, count = trained_states(trajectory, step_plan), len(step_plan.plan.trains)
        if self.distance_weight:
            value = accumulate_distance(self.backbone, self.adapter, states, count, condition, self.distance_weight)
        elif self.distance_every and step % self.distance_every == 0:
            value = velocity_distance(self.backbone, self.adapter, states, condition)
        else:
            return {}
        return {"distance": value}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        self.rollouts.after_step(metrics)

    def state_dict(self) -> dict[str, Tensor]:
        return self.rollouts.state_dict()

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.rollouts.load_state_dict(tensors, self.parameters())

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a step's batch and scored latents, drawn and rolled out again: for the dump of a step that failed."""
        origin, step_plan = self.origin(step, indices), self.plan(step)
        prompts, condition, start = self.draw(*origin)
        network = self.network(condition)
        with self.policy(self.masks(*origin)):
            trajectory = self.trajectory(network, start, step, indices)
            scored = self.rollouts.scored(network, trajectory, step_plan)

        steps, plan = self.schedule.steps, step_plan.plan
        trains = sorted(node_number(k, steps) for k in plan.trains)
        nodes = {str(node_number(node, steps)): step_plan.sigma(node) for node in step_plan.seeds}
        latents = {f"scored/{node_number(node, steps)}": x for node, x in scored.items()}
        facts = {"prompts": prompts, "first": step_plan.first, "nodes": nodes, "trains": trains}
        return {"start": start} | latents, facts


def retains_graph(backbone: Backbone, step_plan: StepPlan) -> bool:
    """Return whether the graph of a plan's only edge is kept for the adjoint: under checkpointing it is small."""
    return backbone.running.checkpointing != "none" and len(step_plan.plan.edges) == 1
