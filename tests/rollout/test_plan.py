from dataclasses import replace

import pytest
import torch

from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import (
    Clean,
    Edge,
    Plan,
    Renoised,
    chain_plan,
    clean_jump,
    full_chain,
    jump_edge,
    last_steps,
    leap_edge,
    node_number,
    one_step,
    order,
    step_edge,
)
from prfl.rollout.solvers import euler

CHAIN = euler(chain_sigmas(6, 3.0))


def ends(plan: Plan) -> list[tuple]:
    return [(edge.source, edge.target) for edge in plan.edges]


def test_named_plans():
    assert ends(one_step(CHAIN, 2)) == [(2, 3)] and one_step(CHAIN, 2).trains == {2}
    assert ends(last_steps(CHAIN, 2)) == [(4, 5), (5, 6)] and last_steps(CHAIN, 2).trains == {4, 5}
    assert len(full_chain(CHAIN).edges) == 6 and set(full_chain(CHAIN).beta.values()) == {1.0}
    assert ends(clean_jump(CHAIN, 3)) == [(3, Clean(3))] and node_number(Clean(3), 6) == 10
    sparse = chain_plan(CHAIN, {1, 4}, beta=0.0)
    assert ends(sparse) == [(i, i + 1) for i in range(1, 6)] and sparse.trains == {1, 4}


def test_nodes_are_ordered_as_edges_lead_and_have_numbers_of_their_own():
    copies = [Renoised(0, 5), Renoised(1, 5)]
    nodes = [0, 3, 6, *copies, Clean(0), Clean(5), *map(Clean, copies)]
    assert sorted(reversed(nodes), key=order) == nodes
    assert [node_number(node, 6) for node in nodes] == [0, 3, 6, 13, 15, 7, 12, 14, 16]


def test_edges_carry_their_targets_sigma():
    assert step_edge(CHAIN, 2).sigma == pytest.approx(float(CHAIN.sigmas[3]))
    assert leap_edge(CHAIN, 1, 4).sigma == pytest.approx(float(CHAIN.sigmas[4]))
    assert leap_edge(CHAIN, 1, 4).b[1] == pytest.approx(float(CHAIN.sigmas[4] - CHAIN.sigmas[1]))
    jump = jump_edge(CHAIN, 1)
    assert jump.sigma == 0 and jump.b[1] == pytest.approx(-float(CHAIN.sigmas[1]))


def test_useful_nodes_are_those_that_lead_to_a_trained_evaluation():
    assert one_step(CHAIN, 2).useful_nodes == {3}
    assert chain_plan(CHAIN, {1, 4}, beta=0.0).useful_nodes == {2, 3, 4, 5, 6}
    edges = tuple(step_edge(CHAIN, i) for i in range(6))
    plan = Plan(edges, frozenset({3}), dict.fromkeys(range(6), 1.0))
    assert plan.useful_nodes == {4, 5, 6}
    # A pure output edge (a = 0 has no source to speak of) still hands on through beta.
    assert Plan((leap_edge(CHAIN, 0, 2), leap_edge(CHAIN, 2, 6)), frozenset({0}), {0: 0.0, 2: 0.5}).useful_nodes == {
        2,
        6,
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: Edge(3, 3, 1.0, {3: -0.1}, 0.0),
        lambda: Edge(1, 2, 1.0, {2: -0.1}, 0.0),
        lambda: Plan((step_edge(CHAIN, 2), leap_edge(CHAIN, 0, 3)), frozenset({2}), {0: 1.0, 2: 1.0}),
        lambda: Plan((step_edge(CHAIN, 2),), frozenset({3}), {2: 1.0, 3: 1.0}),
        lambda: Plan((step_edge(CHAIN, 2),), frozenset({2}), {}),
        lambda: replace(one_step(CHAIN, 2), step_weight={2: 0.0}),
        lambda: last_steps(CHAIN, 7),
    ],
    ids=["loop", "output of the target", "two edges to a node", "trains off the edges", "no beta", "weight 0", "K > N"],
)
def test_inconsistent_plans_are_refused(make):
    with pytest.raises(AssertionError):
        make()


def test_multistep_edges_name_every_output():
    sigmas = torch.linspace(1, 0, 4, dtype=torch.float64)
    schedule = euler(sigmas)
    two_step = type(schedule)(sigmas, schedule.a, ({0: -0.3}, {1: -0.5, 0: 0.2}, {2: -0.5, 1: 0.2}), (0.0,) * 3)
    plan = one_step(two_step, 2)
    assert plan.evaluations == {1, 2} and plan.trains == {2} and plan.useful_nodes == {3}
