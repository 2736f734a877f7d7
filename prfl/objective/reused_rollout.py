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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prfl.rollout.adjoint import target_latents
from prfl.rollout.trajectory import Network, Trajectory, coarse
from prfl.utils.errors import PrflError

if TYPE_CHECKING:
    from prfl.objective.step_plan import StepPlan


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

    def begin(self, step: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make ``step`` the one of a new rollout, if it is time.  Every part of a step's batch may say this."""
        if self.rolled_at is None or self.stale or step >= self.rolled_at + self.gradients:
            self.rolled_at, self.stale = step, False
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
            self.trajectories.clear()

    def origin(self, step: int, indices: Sequence[int]) -> tuple[int, list[int]]:
        """The step of the rollout, and the indices that these samples had there."""
        assert self.rolled_at is not None
        return self.rolled_at, [index - (step - self.rolled_at) * self.batch for index in indices]

    def of_step(self, stored: Trajectory, step: int) -> Trajectory:
        """What ``step`` sees of the rollout: its latents, and only in step R itself its outputs."""
        return replace(stored, outputs=stored.outputs if step == self.rolled_at else {})

    def observe(self, metrics: Mapping[str, float]) -> None:
        """metrics: of a whole step, over all processes."""
        self.stale = self.drift_limit is not None and metrics.get("drift", 0.0) > self.drift_limit

    def carried(self) -> dict[str, Tensor]:
        if self.rolled_at is None:
            return {}
        facts = {"rolled_at": torch.tensor(self.rolled_at), "stale": torch.tensor(self.stale)}
        return facts | {f"weights/{name}": value for name, value in self.weights.items()}

    def restore(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
        """Raises PrflError when the weights are of other parameters."""
        weights = {k.removeprefix("weights/"): value for k, value in tensors.items() if k.startswith("weights/")}
        if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in parameters.items()}:
            what = "the checkpoint's rollout was made with weights that do not fit the policy's"
            raise PrflError(what, where="objective.safetensors", fix="resume from another checkpoint")
        self.rolled_at, self.stale = int(tensors["rolled_at"]), bool(tensors["stale"])
        self.weights = weights
        self.trajectories.clear()


@dataclass(frozen=True)
class Span:
    """What a rollout for several steps visits and keeps: latents and outputs, by their nodes."""

    path: list[int]
    latents: frozenset[int]
    outputs: frozenset[int]


def span(plans: Sequence[StepPlan], stride: int, held_edge: bool) -> Span:
    """plans: of the steps that it serves.  held_edge: whether the first of them runs its own edge (``retain_graph``).

    The outputs are what scores the first step's edges without another network call, and what drift is measured from.
    """
    own, *others = (step_plan.plan.trains for step_plan in plans)
    latents = own.union(*others)
    outputs = frozenset().union(*others) if held_edge else latents
    last = max(latents | {k + 1 for k in outputs})
    ends = {k + 1 for k in own if k < last}
    return Span(coarse({0, last} | latents | ends, stride), latents, outputs)


def edge_ends(network: Network, trajectory: Trajectory, step_plan: StepPlan) -> dict[int, Tensor]:
    """Where the edges to the seeds end, from the stored latents that they start at; not those stored there."""
    edges = [edge for edge in step_plan.plan.edges if edge.target in step_plan.seeds]
    return {edge.target: target_latents(network, trajectory, edge) for edge in edges}


def drift(network: Network, stored: Trajectory, ends: Mapping[int, Tensor], step_plan: StepPlan) -> float:
    """Mean over samples and scored edges.  ends: the edges' ends as they are now, by node."""
    then = edge_ends(network, stored, step_plan)
    ratios = []
    for edge in step_plan.plan.edges:
        if edge.target in then:
            end = then[edge.target]
            moved, missed = end - stored.at(edge.source), ends[edge.target] - end
            ratios.append(missed.flatten(1).norm(dim=1) / moved.flatten(1).norm(dim=1))
    return float(torch.stack(ratios).mean())
