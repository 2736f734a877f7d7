"""One rollout for the gradients of several optimizer steps.

The rollout is most of a PRFL step's network calls, and its latents change slowly, only as the policy does.  So the
rollout of step R serves the steps s = R .. R + gradients - 1.  Each of them draws its own m as usual, but takes the
prompts, the noise and the stored latents x[m] of step R.  It runs its trained edge again with the present policy:

    x'[m+1] = A x[m] + B f(x[m], sigma[m]; theta[s])

**The reward is read at x'[m+1], not at the stored x[m+1].**  The loss depends on theta[s] through x' alone, so this
gradient is exact for the given x[m], which PRFL takes as a constant anyway.  Only the choice of visited states is
stale.  A seed read at the stored x[m+1] would repeat the gradient at theta[R]: it would not see what the steps since R
have gained, and would go on raising a reward that is already above the hinge.

**Drift** measures how stale the states are: per sample |x'[m+1] - x[m+1]| / |x[m+1] - x[m]|.  For a hand-off to the
clean prediction, that prediction takes the place of x[m+1].  With Euler both are |f' - f| / |f|.  Drift costs no
network call: x' is scored anyway, and x[m+1] follows from the stored output of the rollout.  Where the drift of a step,
over the whole batch, is above the limit, the next step makes a new rollout, which again serves ``gradients`` steps.

With several scored edges (dense process rewards) each edge starts at its own stored latents.  The cotangent of a later
reward still reaches the earlier steps along the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.weights import holding
from prfl.rollout.adjoint import target_latents
from prfl.rollout.plan import Node, StepPlan
from prfl.rollout.trajectory import Network, Trajectory
from prfl.utils.errors import PrflError

Plans = Callable[[int], StepPlan]
"""Maps an optimizer step to what it differentiates."""

Roll = Callable[[Sequence[StepPlan], int, Sequence[int]], Trajectory]
"""(plans, step, indices) -> the rollout of these samples, as far as the plans need it: ``RewardGradient.roll``."""


class FreshRollout:
    """Every optimizer step makes its own rollout.  ``ReusedRollout`` has the same methods."""

    reused = False

    def begin(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        pass

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Return the step in which the samples are rolled out, and their indices in that step."""
        return step, list(indices)

    def trajectory(
        self, roll: Roll, plans: Plans, parameters: Mapping[str, nn.Parameter], step: int, indices: Sequence[int]
    ) -> Trajectory:
        """Return the rollout that the step works on."""
        return roll([plans(step)], step, indices)

    def scored(self, network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
        """Return the latents at the seeds: those that the rollout kept; for other nodes, where their edge ends."""
        on_chain = {node: trajectory.at(node) for node in step_plan.seeds if trajectory.has(node)}
        edges = [edge for edge in step_plan.scored_edges if edge.target not in on_chain]
        return on_chain | {edge.target: target_latents(network, trajectory, edge) for edge in edges}

    def metrics(
        self, network: Network, scored: Mapping[Node, Tensor], step_plan: StepPlan, step: int, indices: Sequence[int]
    ) -> dict[str, float]:
        return {}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        pass

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        pass


@dataclass
class ReusedRollout:
    """Several optimizer steps share one rollout.

    gradients: the most optimizer steps that one rollout serves.  batch: samples of a step, over all processes.
    drift_limit: a step with more drift than this is followed by a new rollout; None keeps every rollout for all its
    steps.  A step without a new rollout skips its own indices, so an epoch trains on a random part of the prompts.

    State that a checkpoint saves: ``rolled_at`` is the step R.  ``weights`` are the policy's at that step, in host
    memory; a resumed run makes the rollout again with them, on any number of processes.  ``stale`` says whether the
    next step makes a new rollout.
    Not saved: ``trajectories``, this process's parts of the rollout by their sample indices, latents in host memory.
    """

    gradients: int
    batch: int
    drift_limit: float | None = None
    rolled_at: int | None = None
    stale: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)
    trajectories: dict[tuple[int, ...], Trajectory] = field(default_factory=dict)

    reused = True

    def begin(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Start a new rollout at ``step`` if one is due.  May be called for every part of a step's batch."""
        if self.rolled_at is None or self.stale or step >= self.rolled_at + self.gradients:
            self.rolled_at, self.stale = step, False
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
            self.trajectories.clear()

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Return the step R of the rollout, and the indices that these samples had in it."""
        assert self.rolled_at is not None
        return self.rolled_at, [index - (step - self.rolled_at) * self.batch for index in indices]

    def trajectory(
        self, roll: Roll, plans: Plans, parameters: Mapping[str, nn.Parameter], step: int, indices: Sequence[int]
    ) -> Trajectory:
        """Return the rollout as ``step`` may use it: its latents; in step R also its outputs and ``cached``.

        Later steps must not use the outputs: these are of the policy as it was at step R.
        """
        rolled_at, first_indices = self.origin(step, indices)
        part = tuple(first_indices)
        if part not in self.trajectories:
            served = [plans(later) for later in range(rolled_at, rolled_at + self.gradients)]
            # A resumed run makes the rollout of step R again, with the weights that the policy had at step R.
            with nullcontext() if rolled_at == step else holding(parameters, self.weights):
                self.trajectories[part] = roll(served, rolled_at, first_indices)
        stored = self.trajectories[part]
        return stored if step == rolled_at else replace(stored, outputs={}, cached=None)

    def scored(self, network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
        """Return the latents at the seeds, computed with the present policy (``edge_ends``), not the stored ones."""
        return edge_ends(network, trajectory, step_plan)

    def metrics(
        self, network: Network, scored: Mapping[Node, Tensor], step_plan: StepPlan, step: int, indices: Sequence[int]
    ) -> dict[str, float]:
        """Return the age of the rollout in optimizer steps, and after step R also its drift."""
        rolled_at, first_indices = self.origin(step, indices)
        age = {"rollout_age": float(step - rolled_at)}
        if rolled_at == step:
            return age
        return age | {"drift": drift(network, self.trajectories[tuple(first_indices)], scored, step_plan)}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Decide whether the next step makes a new rollout.  metrics: of the whole step, over all processes."""
        self.stale = self.drift_limit is not None and metrics.get("drift", 0.0) > self.drift_limit

    def state_dict(self) -> dict[str, Tensor]:
        if self.rolled_at is None:
            return {}
        facts = {"rolled_at": torch.tensor(self.rolled_at), "stale": torch.tensor(self.stale)}
        return facts | {f"weights/{name}": value for name, value in self.weights.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        """Restore what ``state_dict`` returned.  Raises PrflError when the weights are of other parameters."""
        weights = {k.removeprefix("weights/"): value for k, value in tensors.items() if k.startswith("weights/")}
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            what = "the checkpoint's rollout was made with weights that do not fit the policy's"
            raise PrflError(what, where="objective.safetensors", fix="resume from another checkpoint")
        self.rolled_at, self.stale = int(tensors["rolled_at"]), bool(tensors["stale"])
        self.weights = weights
        self.trajectories.clear()


def edge_ends(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
    """Return the latents at the ends of the scored edges, computed from the stored latents at which they start."""
    return {edge.target: target_latents(network, trajectory, edge) for edge in step_plan.scored_edges}


def drift(
    network: Network,
    stored: Trajectory,
    ends: Mapping[Node, Float[Tensor, "*latents"]],
    step_plan: StepPlan,
) -> float:
    """Return the mean drift over samples and scored edges.

    ends: the latents at the edges' ends, by node, as the present policy computes them.
    """
    ends_then = edge_ends(network, stored, step_plan)
    ratios = []
    for edge in step_plan.scored_edges:
        end = ends_then[edge.target]
        moved = end - stored.at(edge.source)
        missed = ends[edge.target] - end
        ratios.append(missed.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1))
    return float(torch.stack(ratios).mean())
