"""What one optimizer step differentiates, and what a rollout must visit, keep and compute exactly for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from prfl.backbone import Backbone
from prfl.rollout.plan import Edge, Plan
from prfl.rollout.solvers import SolverSchedule
from prfl.rollout.trajectory import coarse


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step differentiates.

    seeds: the nodes at which the reward is read, each with the weight of its loss.
    first: the node that the chain starts at: 0 from noise, else from a clip of the data, noised to that node's sigma.
    noised: nodes beside the chain: x[N] noised anew, to the sigma of a node of the chain.
    similarity: None, or the floor of ``leap_similarity``, by which the samples are weighed.
    """

    plan: Plan
    seeds: Mapping[int, float]
    first: int = 0
    noised: Mapping[int, int] = field(default_factory=dict)
    similarity: float | None = None

    @property
    def node(self) -> int:
        """The first node that is scored: for the log."""
        return min(self.seeds)

    def sigma(self, node: int) -> float:
        """Noise level at a node that an edge leads to."""
        return next(edge.sigma for edge in self.plan.edges if edge.target == node)

    def computed(self, steps: int) -> list[Edge]:
        """The edges whose ends the rollout does not give: what it does not visit, and what it is compared with."""
        off_chain = {node for node in self.seeds if node > steps}
        return [e for e in self.plan.edges if e.target in off_chain or (self.similarity and e.target <= steps)]

    def kept(self, steps: int, held_edge: bool) -> frozenset[int]:
        """The chain's latents that are needed after the rollout, less those that are scored at once."""
        edges = self.plan.edges if held_edge else self.computed(steps)
        nodes = {*self.plan.recomputed, *(edge.source for edge in edges)}
        if self.similarity:
            nodes |= {edge.target for edge in edges}
        if self.noised:
            nodes.add(steps)
        return frozenset(node for node in nodes if node <= steps)

    def constants(self, steps: int, held_edge: bool) -> frozenset[int]:
        """The rollout's outputs that are worth keeping: what computed ends are made of needs no second network call.

        A held edge computes its own; of a multistep solver it has earlier ones too.
        """
        if held_edge:
            return self.plan.evaluations - self.plan.recomputed
        return frozenset(k for edge in self.computed(steps) for k in edge.b)


def retains_graph(backbone: Backbone, step_plan: StepPlan) -> bool:
    """One edge under checkpointing: its graph is small, so it is kept rather than run again for the walk."""
    return backbone.checkpointing != "none" and len(step_plan.plan.edges) == 1


def last_rolled(step_plan: StepPlan, schedule: SolverSchedule, held_edge: bool) -> int:
    """The node at which the rollout ends."""
    scored = [] if held_edge else [node for node in step_plan.seeds if node <= schedule.steps]
    return max([*step_plan.kept(schedule.steps, held_edge), *scored])


def visited(step_plan: StepPlan, schedule: SolverSchedule, held_edge: bool, stride: int) -> list[int]:
    """The nodes that the rollout goes through; both ends of every trained edge, so that these stay the chain's own."""
    plan, last = step_plan.plan, last_rolled(step_plan, schedule, held_edge)
    ends = {node for e in plan.edges if plan.trains & e.b.keys() for node in (e.source, e.target)}
    needed = step_plan.kept(schedule.steps, held_edge) | step_plan.seeds.keys() | ends
    return coarse({step_plan.first, last, *(node for node in needed if node <= last)}, stride)


def exact_nodes(step_plan: StepPlan, path: Collection[int]) -> frozenset[int]:
    """The nodes of a rollout's ``path`` at which a cheaper one computes in full (see backbone/cheaper.py).

    What a walk back differentiates, so that an edge ends where the exact network takes it, and the last step before
    latents that are scored.  All else, a multistep solver's earlier outputs too, only decides which states are visited.
    """
    before = {i for i, after in pairwise(path) if after in step_plan.seeds}
    return step_plan.plan.recomputed | before | {e.source for e in step_plan.plan.edges if e.target in step_plan.seeds}
