"""One rollout for the gradients of several optimizer steps.

The rollout is most of a PRFL step's network calls, and its latents change no faster than the policy does.  So the one
that step R makes serves the steps s = R .. R + gradients - 1: each draws its own m as ever, and takes the prompts, the
noise and the stored latents x[m] of step R.  Its trained edge is run again under the policy as it is now,

    x'[m+1] = A x[m] + B f(x[m], sigma[m]; theta[s])

**The reward is read at x'[m+1], not at the stored x[m+1].**  The loss is a function of theta[s] by way of x' alone, so
this is its exact gradient, given x[m] (which PRFL takes for a constant anyway): stale is only which states are visited.
A seed taken at the stored x[m+1] would be the gradient at theta[R] over and over: it would not see what the steps since
then have reached, and would go on pulling where the hinge is met.

**Drift** says how stale: per sample |x'[m+1] - x[m+1]| / |x[m+1] - x[m]| (for a hand-off to the clean prediction, with
that in place of x[m+1]; both are |f' - f| / |f| for Euler).  x' is what is scored, and x[m+1] follows from the stored
output of the rollout: it costs no network call.  Where a step's drift, over the whole batch, is above the limit, the
next step makes a new rollout, which then serves as many steps again.

Several edges with seeds (dense process rewards) each start at their own stored latents; a later reward's cotangent
still reaches the earlier steps along the chain, straight through.
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
"""What an optimizer step differentiates."""

Roll = Callable[[Sequence[StepPlan], int, Sequence[int]], Trajectory]
"""Rolls out the samples of a step and their indices, as far as some plans need: ``RewardGradient.roll``."""


class FreshRollout:
    """A rollout of its own for every step; ``ReusedRollout`` has the same calls."""

    reused = False

    def begin(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        pass

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Return the step that the samples are rolled out in, and the indices that they have there."""
        return step, list(indices)

    def trajectory(
        self, roll: Roll, plans: Plans, parameters: Mapping[str, nn.Parameter], step: int, indices: Sequence[int]
    ) -> Trajectory:
        """Return what the step works on."""
        return roll([plans(step)], step, indices)

    def scored(self, network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
        """Return the latents at the seeds: the chain's own, and where the other edges to them end."""
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
    """gradients: optimizer steps that a rollout serves at most.  batch: samples of a step, over all processes.

    drift_limit: None keeps every rollout for all its steps.  The indices of a step that makes no rollout are skipped,
    so an epoch of prompts is a random part of them.

    What changes, and is saved: ``rolled_at``, the step R; ``weights``, the policy's then, in host memory, with which a
    resumed run (on another number of processes, too) makes the rollout again; ``stale``, whether the next step is to
    make a new one.  ``trajectories``: this process's parts of the rollout by their indices, latents in host memory.
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
        """Make ``step`` the one of a new rollout, if it is time.  Every part of a step's batch may say this."""
        if self.rolled_at is None or self.stale or step >= self.rolled_at + self.gradients:
            self.rolled_at, self.stale = step, False
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
            self.trajectories.clear()

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """Return the step of the rollout, and the indices that these samples had there."""
        assert self.rolled_at is not None
        return self.rolled_at, [index - (step - self.rolled_at) * self.batch for index in indices]

    def trajectory(
        self, roll: Roll, plans: Plans, parameters: Mapping[str, nn.Parameter], step: int, indices: Sequence[int]
    ) -> Trajectory:
        """Return what ``step`` sees of the rollout: its latents; in step R its outputs and the share cached, too."""
        rolled_at, first_indices = self.origin(step, indices)
        part = tuple(first_indices)
        if part not in self.trajectories:
            served = [plans(later) for later in range(rolled_at, rolled_at + self.gradients)]
            # A resumed run makes it again with the weights that the policy had then.
            with nullcontext() if rolled_at == step else holding(parameters, self.weights):
                self.trajectories[part] = roll(served, rolled_at, first_indices)
        stored = self.trajectories[part]
        return stored if step == rolled_at else replace(stored, outputs={}, cached=None)

    def scored(self, network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
        """Return the latents at the seeds under the present policy: not those stored there (``edge_ends``)."""
        return edge_ends(network, trajectory, step_plan)

    def metrics(
        self, network: Network, scored: Mapping[Node, Tensor], step_plan: StepPlan, step: int, indices: Sequence[int]
    ) -> dict[str, float]:
        """Return the rollout's age in steps, and from the next one on how far the scored latents have moved from it."""
        rolled_at, first_indices = self.origin(step, indices)
        age = {"rollout_age": float(step - rolled_at)}
        if rolled_at == step:
            return age
        return age | {"drift": drift(network, self.trajectories[tuple(first_indices)], scored, step_plan)}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Note whether the next step makes a new rollout.  metrics: of a whole step, over all processes."""
        self.stale = self.drift_limit is not None and metrics.get("drift", 0.0) > self.drift_limit

    def state_dict(self) -> dict[str, Tensor]:
        if self.rolled_at is None:
            return {}
        facts = {"rolled_at": torch.tensor(self.rolled_at), "stale": torch.tensor(self.stale)}
        return facts | {f"weights/{name}": value for name, value in self.weights.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        """Go on from what ``state_dict`` gave.  Raises PrflError when the weights are of other parameters."""
        weights = {k.removeprefix("weights/"): value for k, value in tensors.items() if k.startswith("weights/")}
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            what = "the checkpoint's rollout was made with weights that do not fit the policy's"
            raise PrflError(what, where="objective.safetensors", fix="resume from another checkpoint")
        self.rolled_at, self.stale = int(tensors["rolled_at"]), bool(tensors["stale"])
        self.weights = weights
        self.trajectories.clear()


def edge_ends(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[Node, Tensor]:
    """Return where the edges to the seeds end, from the stored latents that they start at; not those stored there."""
    return {edge.target: target_latents(network, trajectory, edge) for edge in step_plan.scored_edges}


def drift(
    network: Network,
    stored: Trajectory,
    ends: Mapping[Node, Float[Tensor, "*latents"]],
    step_plan: StepPlan,
) -> float:
    """Return the mean over samples and scored edges.  ends: the edges' ends as they are now, by node."""
    ends_then = edge_ends(network, stored, step_plan)
    ratios = []
    for edge in step_plan.scored_edges:
        end = ends_then[edge.target]
        moved = end - stored.at(edge.source)
        missed = ends[edge.target] - end
        ratios.append(missed.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1))
    return float(torch.stack(ratios).mean())
