"""UniPC as coefficients against diffusers' own scheduler: its states, and its gradients through the joint graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from torch.func import functional_call

from prfl.rollout import adjoint
from prfl.rollout.adjoint import retain_graph, target_latents
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import guided_network
from prfl.rollout.plan import Plan, chain_plan, one_step, step_edge
from prfl.rollout.solvers import NEARLY_ONE, SolverSchedule, unipc
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError


def scheduler_of(sigmas: Tensor, order: int, shift: float = 1.0, exact: bool = True) -> UniPCMultistepScheduler:
    """Wan's scheduler.  It rounds sigmas to float32; ``exact`` gives it the float64 ones."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )
    scheduler.set_timesteps(sigmas=sigmas[:-1].numpy().copy())
    if exact:
        scheduler.sigmas = sigmas.clamp(max=NEARLY_ONE)
    return scheduler


def their_states(network, start: Tensor, sigmas: Tensor, order: int) -> list[Tensor]:
    """The states that the network is called at, and the end."""
    scheduler = scheduler_of(sigmas, order)
    states = [start]
    for i, timestep in enumerate(scheduler.timesteps):
        states.append(scheduler.step(network(states[i], sigmas[i]), timestep, states[i]).prev_sample)
    return states


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
def test_the_network_is_called_where_diffusers_calls_it(toy, start, conditions, steps, shift, order):
    sigmas = chain_sigmas(steps, shift)
    network = guided_network(toy, conditions[0])
    with torch.no_grad():
        wanted = their_states(network, start, sigmas, order)
    trajectory = rollout(network, start, unipc(sigmas, order))
    for i, state in enumerate(wanted):
        torch.testing.assert_close(trajectory.at(i), state, rtol=1e-10, atol=1e-10, msg=lambda m, i=i: f"x[{i}]: {m}")


def test_part_of_a_chain_need_not_reach_zero_or_start_at_one(toy, start, conditions):
    sigmas = chain_sigmas(12, 3.0)[4:10]
    network = guided_network(toy, conditions[0])
    trajectory = rollout(network, start, unipc(sigmas))
    with torch.no_grad():
        wanted = their_states(network, start, sigmas, 2)
    torch.testing.assert_close(trajectory.at(5), wanted[-1], rtol=1e-10, atol=1e-10)


def test_our_sigmas_are_those_of_wans_scheduler():
    """The sigma that stands in for 1 included; diffusers shifts in float64 and rounds to float32."""
    theirs = scheduler_of(torch.linspace(1, 0, 41, dtype=torch.float64), 2, shift=5.0, exact=False).sigmas.double()
    torch.testing.assert_close(theirs, chain_sigmas(40, 5.0).clamp(max=NEARLY_ONE), rtol=0, atol=1e-7)


def test_sigmas_that_do_not_descend_are_refused():
    with pytest.raises(PrflError, match="descend"):
        unipc(torch.tensor([1.0, 0.5, 0.5, 0.0]))
    with pytest.raises(PrflError, match="descend"):
        unipc(torch.tensor([1.2, 0.5, 0.0]))


# Gradients.

STEPS = 7
SIGMAS = chain_sigmas(STEPS, 3.0)
CHAIN = unipc(SIGMAS)


def reward(node: int, latents: Tensor) -> Tensor:
    return torch.sin(latents * (node + 1)).sum() + (latents**2).sum() / (node + 1)


def seed_of(node: int, latents: Tensor) -> Tensor:
    leaf = latents.detach().requires_grad_()
    return torch.autograd.grad(reward(node, leaf), leaf)[0]


def through_the_scheduler(toy, start, condition, trained, beta, weight, nodes) -> list[Tensor]:
    """One graph through diffusers' scheduler, which knows no edges, no b and no walk."""
    named = dict(toy.named_parameters())
    scheduler = scheduler_of(SIGMAS, 2)
    states = [start]
    for i, timestep in enumerate(scheduler.timesteps):
        share = weight.get(i, 1.0) if i in trained else 0.0
        weights = {name: share * p + (1 - share) * p.detach() for name, p in named.items()}
        mixed = beta * states[i] + (1 - beta) * states[i].detach()
        output = functional_call(toy, weights, (mixed, SIGMAS[i], condition))
        states.append(scheduler.step(output, timestep, states[i]).prev_sample)
    loss = torch.stack([reward(node, states[node]) for node in nodes]).sum()
    return list(torch.autograd.grad(loss, list(toy.parameters())))


def walked(toy, trajectory, condition, plan: Plan, nodes) -> list[Tensor]:
    toy.zero_grad()
    seeds = {node: seed_of(node, trajectory.at(node)) for node in nodes}
    adjoint.backward(guided_network(toy, condition), trajectory, plan, seeds, list(toy.parameters()))
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in toy.parameters()]


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("trained", [range(STEPS), {0, 3, 4}, {2, 6}, {5}])
def test_walk_back_equals_the_graph_through_diffusers(toy, start, conditions, beta, trained):
    nodes, weight = [n for n in (3, 5, STEPS) if n > min(trained)], {3: 0.3, 6: 2.5}
    trajectory = rollout(guided_network(toy, conditions[0]), start, CHAIN)
    edges = tuple(step_edge(CHAIN, i) for i in range(STEPS))
    plan = Plan(edges, frozenset(trained), dict.fromkeys(range(STEPS), beta), weight)
    wanted = through_the_scheduler(toy, start, conditions[0], set(trained), beta, weight, nodes)
    torch.testing.assert_close(walked(toy, trajectory, conditions[0], plan, nodes), wanted, rtol=1e-8, atol=1e-10)
    # Edges below the first trained step change nothing.
    short = replace(chain_plan(CHAIN, trained, beta=beta), step_weight=weight)
    torch.testing.assert_close(walked(toy, trajectory, conditions[0], short, nodes), wanted, rtol=1e-8, atol=1e-10)


def test_one_step_needs_one_call_with_gradient_and_none_without(toy, start, conditions):
    """PRFL's plan: earlier outputs are constants of the edge; a held edge takes them from the rollout."""
    m, network, parameters = 4, guided_network(toy, conditions[0]), list(toy.parameters())
    plan = one_step(CHAIN, m)
    assert plan.evaluations == set(range(m + 1)) and plan.recomputed == {m}
    whole = rollout(network, start, CHAIN, last=m + 1, keep={m})
    toy.calls = 0
    wanted = walked(toy, whole, conditions[0], plan, [m + 1])
    assert toy.calls == 1

    trajectory = rollout(network, start, CHAIN, last=m, keep={m}, keep_outputs=set(range(m)))
    assert set(trajectory.outputs) == set(range(m))
    toy.zero_grad()
    toy.calls = 0
    held = retain_graph(network, trajectory, plan, parameters)
    torch.testing.assert_close(held.latents, whole.at(m + 1))
    torch.testing.assert_close(target_latents(network, trajectory, plan.edges[0]), whole.at(m + 1))
    held.backward(seed_of(m + 1, held.latents))
    assert toy.calls == 2, "the held edge's own, and target_latents'"
    torch.testing.assert_close([p.grad for p in parameters], wanted)


def test_a_rollout_keeps_no_output_that_nobody_asked_for(toy, start, conditions):
    network = guided_network(toy, conditions[0])
    assert not rollout(network, start, CHAIN, last=4).outputs
    with pytest.raises(PrflError, match="before the start"):
        rollout(network, start, CHAIN, first=2)


def test_a_planted_error_is_caught(toy, start, conditions):
    """A percent on one term in an earlier output."""
    b = list(CHAIN.b)
    b[4] = {**b[4], 3: 1.01 * b[4][3]}
    wrong = SolverSchedule(CHAIN.sigmas, CHAIN.a, tuple(b), CHAIN.c)
    network = guided_network(toy, conditions[0])
    end = rollout(network, start, CHAIN).at(STEPS)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(rollout(network, start, wrong).at(STEPS), end, rtol=1e-6, atol=1e-6)
