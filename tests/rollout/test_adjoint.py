"""The two-phase walk against plain autograd through the joint graph, in float64."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from prfl.estimate.live_tensors import SavedBytes
from prfl.rollout import adjoint
from prfl.rollout.adjoint import retain_graph, target_latents
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import guided_network
from prfl.rollout.plan import (
    Clean,
    Node,
    Plan,
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
    unit_steps,
)
from prfl.rollout.solvers import SolverSchedule, ancestral, ddim, euler, flow_sde, unipc, unit_step_weight
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError

STEPS = 6
SIGMAS = chain_sigmas(STEPS, 3.0)


def two_step(sigmas: Tensor) -> SolverSchedule:
    """Uneven two-step Adams-Bashforth: every output but the first enters two steps."""
    change = sigmas.diff().tolist()
    b = [{0: change[0]}]
    for i in range(1, len(change)):
        ratio = change[i] / change[i - 1]
        b.append({i: change[i] * (1 + ratio / 2), i - 1: -change[i] * ratio / 2})
    return SolverSchedule(sigmas, (1.0,) * len(change), tuple(b), (0.0,) * len(change))


SOLVERS = {
    "euler": euler(SIGMAS),
    "ddim": ddim(torch.linspace(0.05, 1.0, STEPS + 1, dtype=torch.float64)),
    "ddim-eta": ddim(torch.linspace(0.05, 1.0, STEPS + 1, dtype=torch.float64), eta=0.7),
    "multistep": two_step(SIGMAS),
    "unipc": unipc(SIGMAS),
    "ancestral": ancestral(SIGMAS, eta=0.7),
    "flow-sde": flow_sde(SIGMAS, eta=0.7),
}


def reward(node: Node, latents: Tensor) -> Tensor:
    """Another nonlinear scalar at each node."""
    node = node_number(node, STEPS)
    return torch.sin(latents * (node + 1) + node).sum() + (latents**2).sum() / (node + 1)


def seed_of(node: Node, latents: Tensor) -> Tensor:
    leaf = latents.detach().requires_grad_()
    return torch.autograd.grad(reward(node, leaf), leaf)[0]


def gradients(toy: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in toy.parameters()]


def noises_for(start: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(start.shape, generator=generator, dtype=start.dtype) for _ in range(STEPS)]


def roll(toy, start, conditions, schedule, **guidance):
    return rollout(guided_network(toy, *conditions, **guidance), start, schedule, noises=noises_for(start), keep="all")


def two_phase(toy, trajectory, conditions, plan: Plan, nodes, **guidance) -> list[Tensor]:
    """.grad after: targets of the edges, seeds on leaves, one walk."""
    network = guided_network(toy, *conditions, **guidance)
    edge_to = {edge.target: edge for edge in plan.edges}
    seeds = {
        node: seed_of(
            node, trajectory.at(node) if isinstance(node, int) else target_latents(network, trajectory, edge_to[node])
        )
        for node in nodes
    }
    toy.zero_grad()
    adjoint.backward(network, trajectory, plan, seeds, list(toy.parameters()))
    return gradients(toy)


def joint_graph(toy, trajectory, conditions, plan: Plan, nodes, **guidance) -> list[Tensor]:
    """The same by one graph, written naively: beta and step_weight mix a tensor with its detached self."""
    named = dict(toy.named_parameters())

    def evaluate(k: int, x: Tensor) -> Tensor:
        share = plan.step_weight.get(k, 1.0) if k in plan.trains else 0.0
        weights = {name: share * p + (1 - share) * p.detach() for name, p in named.items()}
        call = lambda x, sigma, condition: functional_call(toy, weights, (x, sigma, condition))  # noqa: E731
        mixed = plan.beta[k] * x + (1 - plan.beta[k]) * x.detach()
        return guided_network(call, *conditions, **guidance)(mixed, trajectory.schedule.sigmas[k])

    x = {node: trajectory.at(node) for node in range(STEPS + 1)}
    for edge in sorted(plan.edges, key=lambda edge: order(edge.target)):
        source = edge.through * x[edge.source] + (1 - edge.through) * x[edge.source].detach()
        value = edge.a * source + sum(b * evaluate(k, x[k]) for k, b in edge.b.items())
        if edge.c:
            value = value + edge.c * trajectory.noises[edge.source]
        if isinstance(edge.target, int):  # straight-through: the chain's own value, the edge's gradient
            value = value + (trajectory.at(edge.target) - value).detach()
        x[edge.target] = value
    loss = torch.stack([reward(node, x[node]) for node in nodes]).sum()
    found = torch.autograd.grad(loss, list(toy.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(toy.parameters(), found, strict=True)]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def random_plan(schedule: SolverSchedule, seed: int) -> tuple[Plan, list[int]]:
    """Steps, leaps and jumps; random S, beta in {0, 1, 0.3} and step weights; seeds at several useful nodes."""
    dice = random.Random(seed)
    while True:
        edges = []
        for target in range(1, STEPS + 1):
            kind = dice.choice(["step", "step", "step", "leap", "nothing"])
            if kind == "step":
                edges.append(step_edge(schedule, target - 1))
            elif kind == "leap":
                edges.append(leap_edge(schedule, dice.randrange(target), target))
        edges += [jump_edge(schedule, m) for m in range(STEPS) if dice.random() < 0.3]
        edges = [dataclasses.replace(edge, through=dice.choice([1.0, 1.0, 0.0, 0.3])) for edge in edges]
        dice.shuffle(edges)
        evaluations = sorted({k for edge in edges for k in edge.b})
        trains = frozenset(k for k in evaluations if dice.random() < 0.5)
        beta = {k: dice.choice([0.0, 1.0, 0.3]) for k in evaluations}
        weight = {k: dice.uniform(0.1, 5) for k in evaluations if dice.random() < 0.5}
        plan = Plan(tuple(edges), trains, beta, weight)
        nodes = [node for node in sorted(plan.useful_nodes, key=order) if dice.random() < 0.6]
        if nodes:
            return plan, nodes


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("gradient, scale", [("none", 1.0), ("cond", 3.0), ("both", 3.0)])
@pytest.mark.parametrize("seed", range(8))
def test_random_plans(toy, start, conditions, solver, gradient, scale, seed):
    guidance = {"gradient": gradient, "scale": scale}
    plan, nodes = random_plan(SOLVERS[solver], seed)
    trajectory = roll(toy, start, conditions, SOLVERS[solver], **guidance)
    wanted = joint_graph(toy, trajectory, conditions, plan, nodes, **guidance)
    assert_same(two_phase(toy, trajectory, conditions, plan, nodes, **guidance), wanted)


def test_random_plans_are_varied():
    """The test above is worth something: plans hold leaps, jumps, all betas, several seeds, untrained evaluations."""
    drawn = [random_plan(SOLVERS["euler"], seed) for seed in range(8)]
    spans = {node_number(edge.target, STEPS) - edge.source for plan, _ in drawn for edge in plan.edges}
    assert {1, 2, 3} <= spans and max(spans) > STEPS
    assert {beta for plan, _ in drawn for beta in plan.beta.values()} == {0.0, 1.0, 0.3}
    assert {edge.through for plan, _ in drawn for edge in plan.edges} == {0.0, 1.0, 0.3}
    assert sum(len(nodes) > 1 for _, nodes in drawn) >= 4
    assert any(plan.evaluations - plan.trains for plan, _ in drawn)


# Each plants one error in a plan's description or in the walk.


def _wrong_b(plan: Plan, nodes: list[int]):
    first, *rest = plan.edges
    return dataclasses.replace(plan, edges=(dataclasses.replace(first, b={0: 1.01 * first.b[0]}), *rest)), nodes


def _wrong_a(plan: Plan, nodes: list[int]):
    *rest, last = plan.edges
    return dataclasses.replace(plan, edges=(*rest, dataclasses.replace(last, a=1.01 * last.a))), nodes


def _wrong_beta(plan: Plan, nodes: list[int]):
    return dataclasses.replace(plan, beta={**plan.beta, 2: 0.9}), nodes


def _dropped_seed(plan: Plan, nodes: list[int]):
    return plan, nodes[1:]


def _untrained_step(plan: Plan, nodes: list[int]):
    return dataclasses.replace(plan, trains=plan.trains - {3}), nodes


def _no_step_weight(plan: Plan, nodes: list[int]):
    return dataclasses.replace(plan, step_weight={}), nodes


@pytest.mark.parametrize("plant", [_wrong_b, _wrong_a, _wrong_beta, _dropped_seed, _untrained_step, _no_step_weight])
def test_a_planted_error_is_caught(toy, start, conditions, plant):
    schedule = SOLVERS["euler"]
    plan = dataclasses.replace(full_chain(schedule), step_weight=unit_step_weight(schedule))
    nodes = [2, 5, STEPS]
    trajectory = roll(toy, start, conditions, schedule)
    wanted = joint_graph(toy, trajectory, conditions, plan, nodes)
    assert_same(two_phase(toy, trajectory, conditions, plan, nodes), wanted)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(two_phase(toy, trajectory, conditions, *plant(plan, nodes)), wanted)


def test_step_weight_on_the_cotangent_is_caught(toy, start, conditions, monkeypatch):
    schedule = SOLVERS["euler"]
    plan = dataclasses.replace(full_chain(schedule), step_weight=unit_step_weight(schedule))
    trajectory = roll(toy, start, conditions, schedule)
    wanted = joint_graph(toy, trajectory, conditions, plan, [STEPS])
    pull_back = adjoint._pull_back

    def weighted(network, trajectory, plan, k, *rest):
        pulled = pull_back(network, trajectory, plan, k, *rest)
        return None if pulled is None else plan.step_weight[k] * pulled

    monkeypatch.setattr(adjoint, "_pull_back", weighted)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(two_phase(toy, trajectory, conditions, plan, [STEPS]), wanted)


# Named methods against hand-written loops that know nothing of plans.


def test_full_chain_equals_autograd(toy, start, conditions):
    schedule, parameters = SOLVERS["euler"], list(toy.parameters())

    def plain() -> Tensor:
        x, total = start, torch.zeros((), dtype=start.dtype)
        for i in range(STEPS):
            x = x + (SIGMAS[i + 1] - SIGMAS[i]) * toy(x, SIGMAS[i], conditions[0])
            if i + 1 in (3, STEPS):
                total = total + reward(i + 1, x)
        return total

    trajectory = roll(toy, start, conditions, schedule)
    got = two_phase(toy, trajectory, conditions, full_chain(schedule), [3, STEPS])
    assert_same(got, list(torch.autograd.grad(plain(), parameters)))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("gradient, scale", [("none", 1.0), ("cond", 3.0), ("both", 3.0)])
@pytest.mark.parametrize("seed", range(4))
def test_finite_differences(toy, start, conditions, solver, gradient, scale, seed):
    """The slope of the rolled-out rewards themselves: the parameters are moved a little, in the trained steps only.

    Where only the conditional branch has gradient, the outputs of the other are held as they were.
    """
    schedule, dice = SOLVERS[solver], random.Random(seed)
    trains = sorted(dice.sample(range(STEPS), dice.randint(1, STEPS)))
    nodes = sorted({STEPS, dice.randint(trains[0] + 1, STEPS)})
    plan = chain_plan(schedule, trains)  # beta = 1 everywhere: all that follows from a step counts
    trajectory = roll(toy, start, conditions, schedule, gradient=gradient, scale=scale)
    got = two_phase(toy, trajectory, conditions, plan, nodes, gradient=gradient, scale=scale)

    torch.manual_seed(seed)
    named = dict(toy.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in named.items()}
    trained_at = {float(schedule.sigmas[k]) for k in trains}
    unmoved: dict[float, Tensor] = {}

    def rolled(size: float) -> Tensor:
        moved = {name: p + size * direction[name] for name, p in named.items()}

        def velocity(x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
            if size and gradient == "cond" and condition is conditions[1]:
                return unmoved[float(sigma)]
            output = functional_call(toy, moved if float(sigma) in trained_at else named, (x, sigma, condition))
            if condition is conditions[1]:
                unmoved.setdefault(float(sigma), output)
            return output

        trajectory = roll(velocity, start, conditions, schedule, gradient=gradient, scale=scale)
        return torch.stack([reward(node, trajectory.at(node)) for node in nodes]).sum()

    rolled(0.0)
    slope = sum((g * d).sum() for g, d in zip(got, direction.values(), strict=True))
    torch.testing.assert_close(slope, (rolled(1e-6) - rolled(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


def test_prfl_is_one_step_with_its_seed_at_the_next_node(toy, start, conditions):
    schedule, m = SOLVERS["euler"], 2
    trajectory = rollout(guided_network(toy, conditions[0]), start, schedule, last=m + 1, keep={m})
    toy.calls = 0
    x = trajectory.at(m)
    loss = reward(m + 1, x + (SIGMAS[m + 1] - SIGMAS[m]) * toy(x, SIGMAS[m], conditions[0]))
    wanted = list(torch.autograd.grad(loss, list(toy.parameters())))
    toy.calls = 0
    assert_same(two_phase(toy, trajectory, conditions, one_step(schedule, m), [m + 1]), wanted)
    assert toy.calls == 1


def test_refl_jumps_to_the_clean_prediction(toy, start, conditions):
    schedule, m = SOLVERS["euler"], 4
    trajectory = roll(toy, start, conditions, schedule)
    x, node = trajectory.at(m), Clean(m)
    loss = reward(node, x - SIGMAS[m] * toy(x, SIGMAS[m], conditions[0]))
    wanted = list(torch.autograd.grad(loss, list(toy.parameters())))
    assert_same(two_phase(toy, trajectory, conditions, clean_jump(schedule, m), [node]), wanted)


def test_vader_holds_the_last_step_alone(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    x = trajectory.at(STEPS - 1)
    loss = reward(STEPS, x + (SIGMAS[-1] - SIGMAS[-2]) * toy(x, SIGMAS[-2], conditions[0]))
    wanted = list(torch.autograd.grad(loss, list(toy.parameters())))
    assert_same(two_phase(toy, trajectory, conditions, last_steps(schedule, 1), [STEPS]), wanted)


def test_drtune_stops_the_input_and_needs_no_input_gradient(toy, start, conditions):
    schedule, trained = SOLVERS["euler"], {1, 3, 4}
    trajectory = roll(toy, start, conditions, schedule)
    x = start
    for i in range(STEPS):
        velocity = toy(x.detach(), SIGMAS[i], conditions[0])
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * (velocity if i in trained else velocity.detach())
    wanted = list(torch.autograd.grad(reward(STEPS, x), list(toy.parameters())))

    asked = []
    network = guided_network(toy, conditions[0])
    spy = lambda latents, sigma: asked.append(latents.requires_grad) or network(latents, sigma)  # noqa: E731
    toy.zero_grad()
    seeds = {STEPS: seed_of(STEPS, trajectory.at(STEPS))}
    plan = chain_plan(schedule, trained, beta=0.0)
    stats = adjoint.backward(spy, trajectory, plan, seeds, list(toy.parameters()))
    assert_same(gradients(toy), wanted)
    assert asked == [False] * 3 and stats.calls == [4, 3, 1]


def test_leapalign_is_two_straight_through_leaps(toy, start, conditions):
    schedule, (k, j), alpha = SOLVERS["euler"], (1, 4), 0.3
    trajectory = roll(toy, start, conditions, schedule)
    leapt = trajectory.at(k) + (SIGMAS[j] - SIGMAS[k]) * toy(trajectory.at(k), SIGMAS[k], conditions[0])
    x = leapt + (trajectory.at(j) - leapt).detach()
    end = x - SIGMAS[j] * toy(alpha * x + (1 - alpha) * x.detach(), SIGMAS[j], conditions[0])
    end = end + (trajectory.at(STEPS) - end).detach()
    wanted = list(torch.autograd.grad(reward(STEPS, end), list(toy.parameters())))
    edges = (leap_edge(schedule, k, j), leap_edge(schedule, j, STEPS))
    plan = Plan(edges, frozenset({k, j}), {k: 1.0, j: alpha})
    assert_same(two_phase(toy, trajectory, conditions, plan, [STEPS]), wanted)


def test_the_walk_calls_only_what_leads_to_a_trained_parameter(toy, start, conditions):
    """Exact chain, one trained step: evaluations below it are not run and its own input gets no gradient."""
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    edges = tuple(step_edge(schedule, i) for i in range(STEPS))
    plan = Plan(edges, frozenset({3}), dict.fromkeys(range(STEPS), 1.0))
    seeds = {STEPS: seed_of(STEPS, trajectory.at(STEPS))}
    stats = adjoint.backward(guided_network(toy, conditions[0]), trajectory, plan, seeds, list(toy.parameters()))
    assert stats.calls == [5, 4, 3] and set(stats.cotangent_norm) == {4, 5, 6}


def test_unit_step_weight_scales_a_single_step_exactly(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    weights = unit_step_weight(schedule)
    for m in (0, STEPS - 1):
        native = two_phase(toy, trajectory, conditions, one_step(schedule, m), [m + 1])
        plan = unit_steps(schedule, one_step(schedule, m))
        unit = two_phase(toy, trajectory, conditions, plan, [m + 1])
        assert_same(unit, [weights[m] * g for g in native])


def test_gradients_accumulate_and_seeds_are_left_alone(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    plan = full_chain(schedule)
    seeds = {node: seed_of(node, trajectory.at(node)) for node in (2, STEPS)}
    before = {node: seed.clone() for node, seed in seeds.items()}
    network, parameters = guided_network(toy, conditions[0]), list(toy.parameters())
    adjoint.backward(network, trajectory, plan, seeds, parameters)
    once = [p.grad.clone() for p in parameters]
    adjoint.backward(network, trajectory, plan, seeds, parameters)
    assert_same(gradients(toy), [2 * g for g in once])
    assert all(torch.equal(seeds[node], before[node]) for node in seeds)
    assert all(not x.requires_grad and x.grad is None for x in trajectory.latents)


def test_only_the_given_parameters_get_a_gradient(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    seeds = {STEPS: seed_of(STEPS, trajectory.at(STEPS))}
    adjoint.backward(guided_network(toy, conditions[0]), trajectory, full_chain(schedule), seeds, [toy.w1])
    assert toy.w1.grad is not None and toy.w2.grad is None


@pytest.mark.parametrize("case", ["frozen", "detached", "no parameters", "input only"])
def test_a_network_without_gradient_is_refused(toy, start, conditions, case):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    seeds = {STEPS: seed_of(STEPS, trajectory.at(STEPS))}
    network, parameters, plan = guided_network(toy, conditions[0]), list(toy.parameters()), full_chain(schedule)
    if case == "frozen":
        toy.requires_grad_(False)
    elif case == "detached":
        network = lambda x, sigma: toy(x, sigma, conditions[0]).detach()  # noqa: E731
        plan = last_steps(schedule, 1)
    elif case == "no parameters":
        parameters = []
    else:  # the graph reaches the latents, but the parameter is another's, and holds an earlier gradient
        parameters = [nn.Parameter(torch.ones(2))]
        parameters[0].grad = torch.ones(2)
    with pytest.raises(PrflError, match="gives no gradient"):
        adjoint.backward(network, trajectory, plan, seeds, parameters)


def test_a_seed_without_effect_is_refused(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    network, parameters = guided_network(toy, conditions[0]), list(toy.parameters())
    with pytest.raises(PrflError, match=r"nodes \[2\]"):
        seeds = {node: torch.ones_like(start) for node in (2, 4)}
        adjoint.backward(network, trajectory, one_step(schedule, 3), seeds, parameters)
    with pytest.raises(PrflError, match="without seeds"):
        adjoint.backward(network, trajectory, one_step(schedule, 3), {}, parameters)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("jump", [False, True])
def test_a_held_edge_saves_the_second_forward(toy, start, conditions, solver, jump):
    schedule, m = SOLVERS[solver], 3
    trajectory = roll(toy, start, conditions, schedule)
    network, parameters = guided_network(toy, conditions[0]), list(toy.parameters())
    plan = unit_steps(schedule, (clean_jump if jump else one_step)(schedule, m))
    node = Clean(m) if jump else m + 1
    wanted = two_phase(toy, trajectory, conditions, plan, [node])
    toy.zero_grad()
    toy.calls = 0
    held = retain_graph(network, trajectory, plan, parameters)
    assert not held.latents.requires_grad
    torch.testing.assert_close(
        held.latents, target_latents(network, trajectory, plan.edges[0]) if jump else trajectory.at(node)
    )
    toy.calls = 0
    held.backward(seed_of(node, held.latents))
    assert toy.calls == 0
    assert_same(gradients(toy), wanted)


# Memory.


def test_saved_bytes_do_not_grow_with_the_number_of_steps(toy, start, conditions):
    schedule = SOLVERS["euler"]
    trajectory = roll(toy, start, conditions, schedule)
    walked, joint = [], []
    for count in (1, 2, 4, STEPS):
        plan = last_steps(schedule, count)
        with SavedBytes() as saved:
            two_phase(toy, trajectory, conditions, plan, [STEPS])
        walked.append(saved.peak)
        assert saved.live == 0
        with SavedBytes() as saved:
            joint_graph(toy, trajectory, conditions, plan, [STEPS])
        joint.append(saved.peak)
    # One step differs from several by what its input's gradient needs.
    assert walked[0] <= walked[1] == walked[2] == walked[3]
    assert joint[3] > 2.5 * joint[1] and joint[3] > 4 * walked[3]
