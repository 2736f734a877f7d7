"""The two-phase step that every reward-gradient method shares: rollout, score, walk back.

A method says only which plan, which seeds and where the chain starts (``StepPlan``); this is how it is carried out:

1. rollout without autograd under the policy's adapter, as far as the step_plan needs;
2. the reward on detached latents, node by node, its gradient there (the seeds), and everything it held is freed;
3. the walk back along the plan, under the policy's adapter again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT, Cheaper
from prfl.backbone.condition import Condition
from prfl.backbone.weights import holding
from prfl.data.dataset import LatentDataset
from prfl.objective.distance import accumulate_distance, velocity_distance
from prfl.objective.reused_rollout import ReusedRollout, drift, edge_ends, span
from prfl.objective.scorer import RewardLoss, Scorer, reward_gradient
from prfl.objective.step_plan import StepPlan, exact_nodes, retains_graph, visited
from prfl.rollout import adjoint
from prfl.rollout.adjoint import retain_graph, target_latents
from prfl.rollout.guidance import guided_network
from prfl.rollout.plan import unit_steps
from prfl.rollout.solvers import SolverSchedule, renoised
from prfl.rollout.trajectory import Network, Trajectory, rollout
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore
from prfl.utils.order import PROMPTS, shuffled
from prfl.utils.timing import Clock


@runtime_checkable
class Method(Protocol):
    """A reward-gradient method.  The step_plan is shared by the whole batch: a function of (seed, step)."""

    @property
    def schedule(self) -> SolverSchedule: ...

    @property
    def noisy(self) -> bool:
        """Whether it ever reads the reward at sigma > 0."""
        ...

    def plan(self, step: int) -> StepPlan: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance while training: see ``rollout.guidance``."""

    scale: float = 1.0
    gradient: Literal["none", "cond", "both"] = "none"


@dataclass
class RewardGradient:
    """An objective: a method, a reward (by its scorer), a loss shape, and the policy's adapter.

    latent_shape: (c, t, h, w).  distance_weight: weight of the velocity's mean squared distance to the base at the
    states the step trains at; with weight 0 it is only measured, every ``distance_every`` steps (0 = never).
    step_weight: ``native``, or ``unit``, which makes every trained step's gradient weigh alike (native: in proportion
    to |sigma[m+1] - sigma[m]|, 22-fold over Wan's chain).  clips: what chains start from that do not from noise.
    reward_batch: samples scored at once; None is all.
    stride: of the rollout, which leaps over that many steps at a time where no node is needed (``visited``).
    reuse: one rollout for several steps; for methods whose chains start from noise and whose edges are trained alone.
    cheaper: how a rollout's network calls are computed but for those that are trained (``exact_nodes``).
    expected: the prompts that will be drawn, encoded at once; None is all of them.
    Raises PrflError for a reward that the method cannot use.
    """

    backbone: Backbone
    method: Method
    scorer: Scorer
    loss: RewardLoss
    prompts: Sequence[str]
    latent_shape: tuple[int, int, int, int]
    seed: int
    adapter: str = "policy"
    guidance: Guidance = Guidance()
    distance_weight: float = 0.0
    distance_every: int = 50
    step_weight: Literal["native", "unit"] = "native"
    clips: LatentDataset | None = None
    reward_batch: int | None = None
    stride: int = 1
    reuse: ReusedRollout | None = None
    cheaper: Cheaper = EXACT
    expected: Sequence[str] | None = None

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
        self.backbone.remember(["", *(self.prompts if self.expected is None else self.expected)])

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.backbone.adapter_parameters(self.adapter)

    def plan(self, step: int) -> StepPlan:
        step_plan = self.method.plan(step)
        if self.step_weight == "native":
            return step_plan
        return replace(step_plan, plan=unit_steps(self.method.schedule, step_plan.plan))

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        clock = Clock(self.backbone.device)
        step_plan = self.plan(step)
        made, own = self.origin(step, indices)
        with clock("condition"):
            _, condition, start = self.draw(made, own)
            network = self.network(condition)
        parameters = list(self.parameters().values())
        held_edge = retains_graph(self.backbone, step_plan)
        dropout = self.dropout(made, own)
        with clock("rollout"), self.backbone.adapter(self.adapter), dropout():
            trajectory = self.trajectory(network, start, step_plan, step, indices, held_edge)
            held = retain_graph(network, trajectory, step_plan.plan, parameters) if held_edge else None
            latents = {step_plan.node: held.latents} if held else self.scored(network, trajectory, step_plan)
            weights = leap_similarity(network, trajectory, step_plan) if step_plan.similarity else None
            metrics = {} if made < step or trajectory.cached is None else {"rollout/cached": trajectory.cached}
            if self.reuse:
                metrics["rollout_age"] = float(step - made)
                if made < step:
                    metrics["drift"] = drift(network, self.reuse.trajectories[tuple(own)], latents, step_plan)
        largest = max(float(x.abs().max()) for x in latents.values())  # the trainer stops where it is not finite
        with clock("reward"):
            seeds, found = self.score(latents, step_plan, condition, step, weights)
            metrics |= found
        with clock("backward"), self.backbone.adapter(self.adapter), dropout():
            if held:
                held.backward(seeds[step_plan.node])
            else:
                adjoint.backward(network, trajectory, step_plan.plan, seeds, parameters)
        with clock("distance"):
            metrics |= self.distance(step, trajectory, step_plan, condition)
        metrics |= {"latents/max": largest, "sampled_step": float(min(step_plan.plan.trains))}
        if self.clips:  # rewards of noised clips and of the policy's own chains are not alike
            metrics["from_data"] = float(step_plan.first > 0)
        return metrics | {"node": float(step_plan.node), "sigma": step_plan.sigma(step_plan.node)} | clock.metrics()

    def dropout(self, step: int, indices: Sequence[int]) -> Callable[[], AbstractContextManager]:
        """One mask a sample, for the rollout, its edges and the walk back alike."""
        seeds = rng.seeds(self.seed, "dropout/policy", step, indices).to(self.backbone.device)
        return partial(self.backbone.dropping, self.adapter, seeds)

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """The step whose rollout is used, and the indices that these samples had in it."""
        if self.reuse is None:
            return step, list(indices)
        self.reuse.begin(step, self.parameters())
        return self.reuse.origin(step, indices)

    def draw(self, step: int, indices: Sequence[int]) -> tuple[list[str], Condition, Tensor]:
        """Prompts, their condition and the start of these samples: noise, or clips of the data with noise."""
        noise = rng.normal(self.latent_shape, self.seed, "start", step, indices).to(self.backbone.device)
        first = self.method.plan(step).first
        if first == 0:
            prompts = [self.prompts[i] for i in shuffled(indices, len(self.prompts), self.seed, PROMPTS)]
            self.backbone.remember(prompts)  # those that nobody expected
            return prompts, self.backbone.condition(prompts), noise
        if self.clips is None:
            what = "the method's chains start from clips of the data, and there are none"
            raise PrflError(what, where="data", fix="give data.manifest or data.generator")
        clips = self.clips.get(shuffled(indices, len(self.clips), self.seed, "clips"))
        return clips.prompts, clips.condition, renoised(self.method.schedule, first, clips.latents.to(noise), noise)

    def noises(self, step: int, indices: Sequence[int]) -> rng.ChainNoises:
        """The noise of a stochastic solver's steps for these samples."""
        return rng.ChainNoises(self.latent_shape, self.seed, step, indices)

    def network(self, condition: Condition) -> Network:
        scale, empty = self.guidance.scale, None
        if scale != 1:
            empty = self.backbone.condition([""] * len(condition))
        return guided_network(self.backbone.velocity, condition, empty, scale=scale, gradient=self.guidance.gradient)

    def trajectory(
        self, network: Network, start: Tensor, step_plan: StepPlan, step: int, indices: Sequence[int], held_edge: bool
    ) -> Trajectory:
        """What the step works on: rolled out for it, or what it sees of a rollout that serves several steps."""
        if self.reuse is None:
            rolled = self.roll(network, start, self.noises(step, indices), step_plan, held_edge)
            return self.noise_again(rolled, step_plan, step, indices)
        made, own = self.reuse.origin(step, indices)
        if tuple(own) not in self.reuse.trajectories:
            # A resumed run makes it again with the weights that the policy had then.
            with nullcontext() if made == step else holding(self.parameters(), self.reuse.weights):
                rolled = self.roll_for_all(network, start, made, own)
            self.reuse.trajectories[tuple(own)] = rolled
        return self.reuse.of_step(self.reuse.trajectories[tuple(own)], step)

    def roll_for_all(self, network: Network, start: Tensor, step: int, indices: Sequence[int]) -> Trajectory:
        """The rollout of ``step`` that serves the steps after it too: their plans are known by now."""
        assert self.reuse is not None
        plans = [self.plan(later) for later in range(step, step + self.reuse.gradients)]
        needs = span(plans, self.stride, retains_graph(self.backbone, plans[0]))
        # The trained steps' outputs are kept, to be scored and to measure drift from: they are exact.
        return self.rolled(
            network, start, needs.latents, last=needs.path[-1], visits=needs.path,
            noises=self.noises(step, indices), keep=needs.latents, keep_outputs=needs.outputs,
            store=HostStore(),
        )  # fmt: skip

    def roll(
        self, network: Network, start: Tensor, noises: rng.ChainNoises, step_plan: StepPlan, held_edge: bool
    ) -> Trajectory:
        """The chain up to the last node that is scored, or up to where the last edge leaves it."""
        schedule = self.method.schedule
        keep = step_plan.kept(schedule.steps, held_edge) | (frozenset() if held_edge else step_plan.seeds.keys())
        path = visited(step_plan, schedule, held_edge, self.stride)
        return self.rolled(
            network, start, exact_nodes(step_plan, path), first=step_plan.first, last=path[-1], visits=path,
            noises=noises,
            keep=keep, keep_outputs=step_plan.constants(schedule.steps, held_edge),
            store=HostStore() if self.backbone.offload else None,
        )  # fmt: skip

    def rolled(self, network: Network, start: Tensor, exact: Set[int], **how: Any) -> Trajectory:
        """``rollout``, its network calls cheaper but at the nodes ``exact``."""
        if self.cheaper == EXACT:
            return rollout(network, start, self.method.schedule, **how)
        calls = self.backbone.cheaper(self.cheaper, exact)
        trajectory = rollout(network, start, self.method.schedule, at=calls.at, **how)
        return replace(trajectory, cached=calls.cached)

    def scored(self, network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[int, Tensor]:
        """The latents that are scored, by node; of a stored rollout they are computed under the present policy."""
        return (edge_ends if self.reuse else scored_latents)(network, trajectory, step_plan)

    def noise_again(self, trajectory: Trajectory, step_plan: StepPlan, step: int, indices: Sequence[int]) -> Trajectory:
        """The trajectory with the nodes that the step_plan has beside the chain."""
        beside = {}
        for node, at in step_plan.noised.items():
            clean = trajectory.at(trajectory.schedule.steps)
            noise = rng.normal(self.latent_shape, self.seed, f"noised/{node}", step, indices).to(clean)
            beside[node] = at, renoised(trajectory.schedule, at, clean, noise)
        return replace(trajectory, beside=beside)

    def score(
        self,
        latents: Mapping[int, Tensor],
        step_plan: StepPlan,
        condition: Condition,
        step: int,
        weights: Tensor | None,
    ) -> tuple[dict[int, Tensor], dict[str, float]]:
        """The seeds, one reward at a time, and the means of their metrics.  weights: (b,), of each sample's loss."""
        seeds, metrics = dict[int, Tensor](), dict[str, float]()
        for node, share in step_plan.seeds.items():
            x = latents[node]
            sigma = torch.tensor(
                step_plan.sigma(node), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
            )
            gradient, found = reward_gradient(
                self.scorer, self.loss, x, sigma, condition, step, at_once=self.reward_batch
            )
            seeds[node] = share * gradient
            if weights is not None:
                seeds[node] *= weights.to(gradient).reshape(-1, *[1] * (gradient.ndim - 1))
            for name, value in found.items():
                metrics[name] = metrics.get(name, 0.0) + share / sum(step_plan.seeds.values()) * value
        return seeds, metrics if weights is None else metrics | {"similarity": float(weights.mean())}

    def distance(
        self, step: int, trajectory: Trajectory, step_plan: StepPlan, condition: Condition
    ) -> dict[str, float]:
        """Mean over the trained states of mean (v_policy - v_base)^2; its gradient is added where it has a weight."""
        trained = sorted(step_plan.plan.trains)
        latents = ((k, trajectory.at(k)) for k in trained)  # one at a time: they may wait in host memory
        states = ((x, trajectory.sigma(k, x)) for k, x in latents)
        if self.distance_weight:
            value = accumulate_distance(
                self.backbone, self.adapter, states, len(trained), condition, self.distance_weight
            )
        elif self.distance_every and step % self.distance_every == 0:
            value = velocity_distance(self.backbone, self.adapter, states, condition)
        else:
            return {}
        return {"distance": value}

    def observe(self, metrics: Mapping[str, float]) -> None:
        if self.reuse:
            self.reuse.observe(metrics)

    def carried(self) -> dict[str, Tensor]:
        return self.reuse.carried() if self.reuse else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        if self.reuse:
            self.reuse.restore(tensors, self.parameters())

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The batch as it was drawn, and its latents rolled out anew."""
        origin = self.origin(step, indices)
        prompts, condition, start = self.draw(*origin)
        step_plan = self.plan(step)
        network = self.network(condition)
        with self.backbone.adapter(self.adapter), self.dropout(*origin)():
            trajectory = self.trajectory(network, start, step_plan, step, indices, held_edge=False)
            scored = self.scored(network, trajectory, step_plan)
        nodes = {str(node): step_plan.sigma(node) for node in step_plan.seeds}
        facts = {"prompts": prompts, "first": step_plan.first, "nodes": nodes, "trains": sorted(step_plan.plan.trains)}
        return {"start": start} | {f"scored/{node}": x for node, x in scored.items()}, facts


def scored_latents(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[int, Tensor]:
    """The latents at the step_plan's seeds; clean predictions, which the chain does not visit, are computed."""
    steps = trajectory.schedule.steps
    on_chain = {node: trajectory.at(node) for node in step_plan.seeds if node <= steps}
    ends = [edge for edge in step_plan.computed(steps) if edge.target > steps]
    return on_chain | {edge.target: target_latents(network, trajectory, edge) for edge in ends}


def leap_similarity(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> Tensor:
    """(b,) weights 1 / sum over leaps of max(floor, mean |where it lands - the chain's own latents there|).

    LeapAlign's: a sample counts by how well its leaps stand for the chain that they shorten.
    """
    assert step_plan.similarity is not None
    distances = []
    for edge in step_plan.computed(trajectory.schedule.steps):
        missed = target_latents(network, trajectory, edge) - trajectory.at(edge.target)
        distances.append(missed.abs().flatten(1).mean(1).clamp(min=step_plan.similarity))
    return 1 / torch.stack(distances).sum(0)
