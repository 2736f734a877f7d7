import dataclasses

import pytest
import torch

from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import SolverSchedule, ddim, euler
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore, Parked

LEVELS = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)


def adams_bashforth(sigmas: torch.Tensor) -> SolverSchedule:
    """Two-step Adams-Bashforth on equal steps: f[i-1] enters with -1/2, f[i] with 3/2."""
    step = float(sigmas[1] - sigmas[0])
    b = [{0: step}, *({i: 1.5 * step, i - 1: -0.5 * step} for i in range(1, len(sigmas) - 1))]
    steps = len(sigmas) - 1
    return SolverSchedule(sigmas, (1.0,) * steps, tuple(b), (0.0,) * steps)


def test_rollout_equals_a_plain_loop(toy, start, conditions):
    network = guided_network(toy, conditions[0])
    sigmas = chain_sigmas(5, 3.0)
    x, expected = start, [start]
    for i in range(5):
        x = x + (sigmas[i + 1] - sigmas[i]) * toy(x, sigmas[i], conditions[0])
        expected.append(x.detach())
    trajectory = rollout(network, start, euler(sigmas))
    for i in range(6):
        torch.testing.assert_close(trajectory.at(i), expected[i])


def test_rollout_keeps_no_graph(toy, start, conditions):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        trajectory = rollout(guided_network(toy, conditions[0]), start.requires_grad_(), euler(chain_sigmas(4, 1.0)))
    assert saved == []
    assert all(x.grad_fn is None and not x.requires_grad for x in trajectory.latents)


def test_keep_stores_only_what_is_asked_for(toy, start, conditions):
    network = guided_network(toy, conditions[0])
    schedule = euler(chain_sigmas(5, 3.0))
    seen = []
    trajectory = rollout(network, start, schedule, keep={2}, store=HostStore(), on_step=lambda i, x: seen.append(i))
    assert isinstance(trajectory.latents[2], Parked) and torch.equal(
        trajectory.at(2), rollout(network, start, schedule).at(2)
    )
    assert [x is not None for x in trajectory.latents] == [False, False, True, False, False, True]
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError, match="node 3"):
        trajectory.at(3)


def test_a_chain_may_start_and_stop_anywhere(toy, start, conditions):
    network = guided_network(toy, conditions[0])
    schedule = euler(chain_sigmas(5, 3.0))
    whole = rollout(network, start, schedule)
    toy.calls = 0
    part = rollout(network, whole.at(1), schedule, first=1, last=4)
    assert toy.calls == 3 and part.latents[0] is None and part.latents[5] is None
    for i in range(1, 5):
        assert torch.equal(part.at(i), whole.at(i))


def test_stochastic_steps_use_their_own_noise(toy, start, conditions):
    network = guided_network(toy, conditions[0])
    schedule = ddim(LEVELS, eta=0.8)
    noises = [torch.randn_like(start) for _ in range(5)]
    trajectory = rollout(network, start, schedule, noises=noises)
    for i in range(5):
        output = toy(trajectory.at(i), schedule.sigmas[i], conditions[0])
        expected = schedule.a[i] * trajectory.at(i) + schedule.b[i][i] * output + schedule.c[i] * noises[i]
        torch.testing.assert_close(trajectory.at(i + 1), expected.detach())
    with pytest.raises(PrflError, match="stochastic"):
        rollout(network, start, schedule)


def test_multistep_outputs_are_reused_and_converge_faster(start):
    """dx/dsigma = x: Adams-Bashforth's error falls 4-fold per doubling, Euler's 2-fold."""
    exact = start * torch.exp(torch.tensor(-1.0))
    errors = {}
    for make in (euler, adams_bashforth):
        for steps in (40, 80):
            sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            end = rollout(lambda x, sigma: x, start, make(sigmas), keep=set()).at(steps)
            errors[make, steps] = float((end - exact).norm())
    assert errors[euler, 40] / errors[euler, 80] == pytest.approx(2, abs=0.2)
    assert errors[adams_bashforth, 40] / errors[adams_bashforth, 80] == pytest.approx(4, abs=0.4)


def test_a_multistep_chain_cannot_start_in_the_middle(toy, start, conditions):
    schedule = adams_bashforth(torch.linspace(1, 0, 6, dtype=torch.float64))
    with pytest.raises(PrflError, match="before the start"):
        rollout(guided_network(toy, conditions[0]), start, schedule, first=2)


def test_sigma_is_not_rounded_to_half_precision(start):
    seen = []
    network = lambda x, sigma: seen.append(sigma) or x  # noqa: E731
    schedule = dataclasses.replace(euler(torch.tensor([0.996, 0.5])), sigmas=torch.tensor([0.996, 0.5]).double())
    rollout(network, start.bfloat16(), schedule)
    assert seen[0].dtype == torch.float32 and float(seen[0]) == pytest.approx(0.996, abs=1e-6)
