"""Plans: along which edges, into which network evaluations and how strongly gradient flows.

A node is a state of latents: ``i`` for x[i] of the chain, i = 0 .. N, and ``Renoised`` or ``Clean`` beside the chain.
Evaluation k is the network's output f[k] at node k.  A plan's edges say how a node follows from an earlier one,

    x[target] = a x[source] + sum over k of b[k] f[k] + c noise

Not every node has an edge to it; no gradient flows where there is none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

from prfl.rollout.solvers import SolverSchedule, leap, unit_step_weight


@dataclass(frozen=True)
class Renoised:
    """x[N] noised again to the sigma of x[i]; ``copy`` numbers several of them."""

    copy: int
    i: int


@dataclass(frozen=True)
class Clean:
    """The clean prediction from ``source``, at sigma 0 (velocity: x - sigma f)."""

    source: int | Renoised


Evaluated = int | Renoised
"""A node at which the network is evaluated."""

Node = int | Renoised | Clean


def on_chain(node: Node) -> TypeGuard[int]:
    return isinstance(node, int)


def order(node: Node) -> tuple[int, ...]:
    """Return a key that sorts nodes so that every edge leads upwards: the chain, renoised nodes, clean predictions."""
    if isinstance(node, Clean):
        return 2, *order(node.source)
    if isinstance(node, Renoised):
        return 1, node.copy
    return 0, node


def node_number(node: Node, steps: int) -> int:
    """Return a node's number in logs and in the names of random draws.  steps: N.

    0 .. N are the chain's nodes, N + 1 + m is Clean(m); from 2 N + 1 each copy has two: Renoised, then its Clean.
    """
    if isinstance(node, Renoised):
        return 2 * steps + 1 + 2 * node.copy
    if isinstance(node, Clean):
        source = node_number(node.source, steps)
        return source + 1 if isinstance(node.source, Renoised) else steps + 1 + source
    return node


@dataclass(frozen=True)
class Edge:
    """x[target] = a x[source] + sum over k of b[k] f[k] + c noise[source]; ``sigma`` is the target's.

    through: the share of the target's cotangent that passes on to the source's latents; 0 cuts the chain there.
    """

    source: Evaluated
    target: Node
    a: float
    b: Mapping[Evaluated, float]
    sigma: float
    c: float = 0.0
    through: float = 1.0

    def __post_init__(self) -> None:
        latest = max(order(node) for node in (self.source, *self.b))
        assert latest < order(self.target), f"an edge must lead forward: {self}"


@dataclass(frozen=True)
class Plan:
    """Edges, and how each network evaluation on them is differentiated.

    trains: the evaluations that give the parameters gradient (S in the papers' tables).
    beta: for each evaluation, the share of gradient that passes through the network's input: 1 is exact, 0 stops it,
    values between damp it.
    step_weight: a positive factor of evaluation k's gradient at the *parameters* alone (1 if k is missing); the
    cotangents of latents do not change.
    """

    edges: Sequence[Edge]
    trains: frozenset[Evaluated]
    beta: Mapping[Evaluated, float]
    step_weight: Mapping[Evaluated, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = [edge.target for edge in self.edges]
        assert len(set(targets)) == len(targets), f"two edges end at one node: {sorted(targets, key=order)}"
        assert self.trains <= self.evaluations, f"trains {set(self.trains)} but edges have {set(self.evaluations)}"
        assert set(self.beta) >= self.evaluations, f"beta for {set(self.beta)}, edges have {set(self.evaluations)}"
        assert all(weight > 0 for weight in self.step_weight.values()), f"step weights {self.step_weight}"

    @property
    def evaluations(self) -> frozenset[Evaluated]:
        """All network evaluations on the edges."""
        return frozenset(k for edge in self.edges for k in edge.b)

    @property
    def recomputed(self) -> frozenset[Evaluated]:
        """The evaluations that the adjoint computes again with autograd; the others are constants on the edges."""
        useful = self.useful_nodes
        return frozenset(k for k in self.evaluations if k in self.trains or self.passes(k, useful))

    @property
    def useful_nodes(self) -> frozenset[Node]:
        """Nodes whose cotangent reaches a trained evaluation: only there does a seed have an effect."""
        useful: set[Node] = set()
        for edge in sorted(self.edges, key=lambda edge: order(edge.target)):
            if (edge.through and edge.source in useful) or any(
                k in self.trains or self.passes(k, useful) for k in edge.b
            ):
                useful.add(edge.target)
        return frozenset(useful)

    def passes(self, k: Evaluated, useful: Collection[Node]) -> bool:
        """Return whether evaluation k must pass a cotangent on to its input latents."""
        return self.beta[k] != 0 and k in useful


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step differentiates.

    seeds: the nodes at which the reward is read, each with the weight of its loss.
    first: the node where the chain starts: 0 is noise; any other starts from a clip of the data, noised to its sigma.
    similarity: the floor of ``leapalign.leap_similarity``, which weights the samples; None weights all alike.
    """

    plan: Plan
    seeds: Mapping[Node, float]
    first: int = 0
    similarity: float | None = None

    @property
    def node(self) -> Node:
        """The first scored node, for the log."""
        return min(self.seeds, key=order)

    @property
    def renoised(self) -> list[Renoised]:
        """The nodes at which x[N] is noised again."""
        return [edge.source for edge in self.plan.edges if isinstance(edge.source, Renoised)]

    @property
    def scored_edges(self) -> list[Edge]:
        """The edges that end where the reward is read."""
        return [edge for edge in self.plan.edges if edge.target in self.seeds]

    def sigma(self, node: Node) -> float:
        """Return the noise level at a node that an edge leads to."""
        return next(edge.sigma for edge in self.plan.edges if edge.target == node)


def step_edge(schedule: SolverSchedule, i: int) -> Edge:
    """Return the chain's own step i -> i + 1."""
    sigma = float(schedule.sigmas[i + 1])
    b: dict[Evaluated, float] = {k: factor for k, factor in schedule.b[i].items()}
    return Edge(i, i + 1, schedule.a[i], b, sigma, schedule.c[i])


def leap_edge(schedule: SolverSchedule, source: int, target: int) -> Edge:
    """Return the edge that leaps from source to target in one deterministic step with f[source]."""
    sigma = float(schedule.sigmas[target])
    a, b = leap(schedule, source, sigma)
    return Edge(source, target, a, {source: b}, sigma)


def jump_edge(schedule: SolverSchedule, source: Evaluated) -> Edge:
    """Return the edge from source to its clean prediction."""
    a, b = leap(schedule, source.i if isinstance(source, Renoised) else source, 0.0)
    return Edge(source, Clean(source), a, {source: b}, 0.0)


def chain_plan(
    schedule: SolverSchedule,
    trains: Collection[int],
    *,
    beta: float = 1.0,
    last: int | None = None,
) -> Plan:
    """Return the plan of the chain from the first trained step to node ``last`` (default N).

    beta = 0 with sparse steps is DRTune; a single step with last = m + 1 is PRFL; the last K with beta = 1 is DRaFT-K.
    """
    last = schedule.steps if last is None else last
    edges = tuple(step_edge(schedule, i) for i in range(min(trains), last))
    betas = {k: beta for edge in edges for k in edge.b}
    return Plan(edges, frozenset(trains), betas)


def one_step(schedule: SolverSchedule, m: int) -> Plan:
    """Return PRFL's plan: step m alone, seed at node m + 1: dL/dtheta = B[m] J_theta f[m]^T r[m+1]."""
    return chain_plan(schedule, [m], beta=0.0, last=m + 1)


def last_steps(schedule: SolverSchedule, count: int, *, beta: float = 1.0) -> Plan:
    """Return the plan of DRaFT-K, and of VADER with count = 1: the last ``count`` steps, seed at node N."""
    steps = schedule.steps
    assert 1 <= count <= steps, f"the last {count} of {steps} steps"
    return chain_plan(schedule, range(steps - count, steps), beta=beta)


def full_chain(schedule: SolverSchedule, *, beta: float = 1.0) -> Plan:
    """Return the plan of all steps, for seeds at any node; beta = 1 is the exact gradient of the whole sampler."""
    return last_steps(schedule, schedule.steps, beta=beta)


def clean_jump(schedule: SolverSchedule, m: int) -> Plan:
    """Return ReFL's plan: one jump from node m to its clean prediction, seed at Clean(m)."""
    return Plan((jump_edge(schedule, m),), frozenset([m]), {m: 0.0})


def unit_steps(schedule: SolverSchedule, plan: Plan) -> Plan:
    """Return the plan with ``step_weight: unit``: the parameter gradients of all trained evaluations weigh alike.

    Without it they weigh as their factors b[k], which vary many-fold along a shifted chain, and are sigma for a jump to
    a clean prediction.  Here the largest factor of each evaluation, on edges from its own node, becomes the chain's
    mean |B|.
    """
    i, weight = next(iter(unit_step_weight(schedule).items()))
    mean = weight * abs(schedule.b[i][i])
    sizes = {k: max(abs(edge.b[k]) for edge in plan.edges if edge.source == k) for k in plan.trains}
    return replace(plan, step_weight={k: mean / size for k, size in sizes.items()})
