"""What a rollout must visit, keep and compute exactly, from the plans of the optimizer steps that it serves.

The rollout, the count of network evaluations and the memory estimate all use this one answer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from prfl.rollout.plan import Evaluated, Node, StepPlan, on_chain
from prfl.rollout.solvers import SolverSchedule


@dataclass(frozen=True)
class Requirements:
    """path: the nodes of the chain that the rollout visits, ascending.

    latents: the nodes whose latents are needed after the rollout.  Those on the chain are kept; those beside it are
    made afterwards.
    outputs: the evaluations whose outputs are needed after the rollout; it keeps those that it computes.
    exact: the nodes at which a cheaper rollout computes in full (``exact_nodes``).
    """

    path: list[int]
    latents: frozenset[Node]
    outputs: frozenset[Evaluated]
    exact: frozenset[int]

    @property
    def calls(self) -> frozenset[Evaluated]:
        """The network evaluations without gradient, up to the nodes where the reward is read."""
        return frozenset(self.path[:-1]) | self.outputs

    @property
    def cheaper_calls(self) -> frozenset[Evaluated]:
        """Those of ``calls`` that a cheaper rollout need not compute in full."""
        return frozenset(self.path[:-1]) - self.exact


def requirements(
    plans: Sequence[StepPlan],
    schedule: SolverSchedule,
    stride: int = 1,
    retain_graph: bool = False,
    reused: bool = False,
) -> Requirements:
    """Return what the rollout of the first of ``plans`` must visit and keep, for it and for the steps after it.

    stride: the rollout takes this many steps in one leap where no node between them is needed (``coarse``).
    retain_graph: the first plan's only edge runs with autograd after the rollout, which therefore ends before it.
    reused: several steps share the rollout.  Each computes the ends of its edges again, with its current policy, and
    reads its reward there, not at the rollout's latents.  All outputs on the edges are kept, to measure the drift.
    """
    first = plans[0]
    latents: set[Node] = set()
    outputs: set[Evaluated] = set()
    for number, step_plan in enumerate(plans):
        kept, constants = _kept(step_plan, schedule.steps, retain_graph and number == 0, reused)
        latents |= kept
        outputs |= constants

    last = max(node for node in latents if on_chain(node))
    ends = trained_ends(first)
    if reused:  # the output of node k is computed on the way to node k + 1
        last = max(last, *(k + 1 for k in outputs if on_chain(k)))
        ends |= {k + 1 for k in first.plan.trains if on_chain(k)}
    path = coarse({first.first, last} | {i for i in latents | ends if on_chain(i) and i <= last}, stride)

    exact = frozenset(i for step_plan in plans for i in exact_nodes(step_plan, path) if on_chain(i))
    return Requirements(path, frozenset(latents), frozenset(outputs), exact)


def _kept(
    step_plan: StepPlan, steps: int, retain_graph: bool, reused: bool
) -> tuple[frozenset[Node], frozenset[Evaluated]]:
    """Return the latents and the outputs that one step needs after the rollout."""
    plan, seeds = step_plan.plan, step_plan.seeds
    # Edges whose ends are computed after the rollout: they lie beside the chain, or are compared with the chain.
    computed = [e for e in step_plan.scored_edges if reused or not on_chain(e.target)]
    if step_plan.similarity:
        computed = list(plan.edges)

    edges = plan.edges if retain_graph else computed
    latents: frozenset[Node] = plan.recomputed | {edge.source for edge in edges}
    if step_plan.similarity:
        latents |= {edge.target for edge in edges}
    if step_plan.renoised:
        latents |= {steps}
    if retain_graph:  # it computes its own output; with a multistep solver it also reads earlier ones
        return latents, plan.evaluations - plan.recomputed
    if not reused:
        latents |= {*seeds}
    return latents, frozenset(k for edge in computed for k in edge.b)


def trained_ends(step_plan: StepPlan) -> frozenset[Node]:
    """Return both ends of every trained edge.  The rollout visits them, so that trained steps are never leaps."""
    plan = step_plan.plan
    trained = [edge for edge in plan.edges if plan.trains & edge.b.keys()]
    return frozenset(node for edge in trained for node in (edge.source, edge.target))


def exact_nodes(step_plan: StepPlan, path: Sequence[int]) -> Set[Evaluated]:
    """Return the nodes of a rollout's ``path`` at which a cheaper one computes in full (see backbone/cheaper.py).

    These are the evaluations that the adjoint differentiates, so that an edge ends where the exact network leads, and
    the last step before scored latents.  All others, a multistep solver's earlier outputs too, only decide which states
    are visited.
    """
    before = {i for i, after in pairwise(path) if after in step_plan.seeds}
    return step_plan.plan.recomputed | before | {edge.source for edge in step_plan.scored_edges}


def coarse(needed: Collection[int], stride: int) -> list[int]:
    """Return a path through all needed nodes: between two of them every ``stride``-th node, counted back from the
    later.

    So a shorter remainder is the first step of a stretch, and the step into a needed node always has the full stride.
    """
    nodes = sorted(needed)
    between = {node for low, high in pairwise(nodes) for node in range(high, low, -stride)}
    return sorted({nodes[0]} | between)
