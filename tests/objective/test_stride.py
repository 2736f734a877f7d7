"""A coarse rollout before fine gradient steps: equal to a plain loop over the nodes that it visits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.rollout import requirements
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.requirements import coarse
from prfl.rollout.solvers import ddim, euler, flow_sde, unipc
from prfl.utils import rng
from prfl.utils.errors import PrflError
from tests.objective import naive
from tests.objective.parts import take_gradients
from tests.objective.toy import LOSS, toy_objective

STEPS = 9
CHAIN = euler(chain_sigmas(STEPS, 3.0))
INDICES = [3, 4]


def way_back(needed: set[int], stride: int) -> list[int]:
    path = [max(needed)]
    while path[0] > 0:
        path.insert(0, max(path[0] - stride, *(node for node in {0, *needed} if node < path[0])))
    return path


def one(world, m, own):
    return naive.one_step(world, m) if own.handoff == "next" else naive.one_prediction(world, m)


def dense(world, drawn, own):
    return naive.dense(world, drawn, own.beta, own.credit, own.handoff)


# Of each: the method, the nodes that must be hit, the loop on a chain of only the visited nodes; network calls beside
# the rollout's (walked, and clean predictions where the rollout ends).
CASES = {
    "prfl": (
        Prfl(CHAIN, 0), lambda t: {*t, max(t) + 1}, lambda w, at, t, own: one(w, at[min(t)], own), lambda t: 1,
    ),
    "refl": (
        Prfl(CHAIN, 0, handoff="clean"), lambda t: {*t}, lambda w, at, t, own: one(w, at[min(t)], own), lambda t: 2,
    ),
    "draft_k": (Vader(CHAIN, 0, 2), lambda t: {7, 8, 9}, lambda w, at, t, own: naive.truncated(w, 2), len),
    "drtune": (
        DrTune(CHAIN, 0, 2), lambda t: {*t, *(k + 1 for k in t), 9},
        lambda w, at, t, own: naive.stopped_inputs(w, sorted(at[k] for k in t), None), len,
    ),
    "leapalign": (
        LeapAlign(CHAIN, 0), lambda t: {*t, 9},
        lambda w, at, t, own: naive.two_leaps(w, *sorted(at[k] for k in t), own.alpha, own.similarity_floor), len,
    ),
    "dense_process": (
        DenseProcess(CHAIN, 0, rewards=3), lambda t: {*t, *(k + 1 for k in t)},
        lambda w, at, t, own: dense(w, sorted(at[k] for k in t), own), len,
    ),
    "dense_process, exact": (
        DenseProcess(CHAIN, 1, rewards=2, beta=1.0, steps_range=(0.4, 1.0)), lambda t: {*t, max(t) + 1},
        lambda w, at, t, own: dense(w, [at[min(t)], at[max(t)]], own), len,
    ),
    "dense_process, clean, each its step": (
        DenseProcess(CHAIN, 6, rewards=4, handoff="clean", credit="step"),
        lambda t: {*t},
        lambda w, at, t, own: dense(w, sorted(at[k] for k in t), own), lambda t: len(t) + 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("stride", [2, 3, 20])
@pytest.mark.parametrize("name", CASES)
def test_equals_a_plain_loop_over_the_visited_nodes(name: str, stride: int, checkpointing: str) -> None:
    method, needed, loop, beside = CASES[name]
    objective = toy_objective(method, stride=stride)
    backbone = objective.backbone
    backbone.running.checkpointing = checkpointing
    for step in range(6):
        trained = method.plan(step).plan.trains
        path = way_back(set(needed(trained)), stride)
        _, condition, start = objective.draw(step, INDICES)
        assert torch.equal(start, rng.normal((3, 1, 1, 1), method.seed, "start", step, INDICES).double())
        world = naive.World(
            start,
            CHAIN.sigmas[path] if path[-1] == STEPS else torch.cat([CHAIN.sigmas[path], torch.zeros(1)]),
            lambda x, sigma, c=condition: backbone.velocity(x, sigma, c),
            lambda x, sigma, c=condition: LOSS(objective.scorer(x, sigma.expand(len(x)), c, 0))[0],
        )
        loop(world, {node: place for place, node in enumerate(path)}, trained, method).backward()
        expected = take_gradients(objective)
        backbone.calls = 0
        objective.accumulate(step, INDICES)
        made = backbone.calls
        for key, gradient in take_gradients(objective).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)
        held = checkpointing == "full" and len(method.plan(step).plan.edges) == 1
        assert made == len(path) - 1 + beside(trained) - held


def test_the_comparison_catches_a_trained_step_that_is_leapt_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were only the starts of trained steps hit, the leap from one would not be the step that the plan trains."""
    monkeypatch.setattr(requirements, "trained_ends", lambda step_plan: frozenset())
    with pytest.raises(AssertionError, match="not close"):
        test_equals_a_plain_loop_over_the_visited_nodes("drtune", 3, "none")


def test_the_visited_nodes() -> None:
    assert coarse({0, 7}, 3) == [0, 1, 4, 7], "what is left over comes first"
    assert coarse({0, 3, 4, 9}, 2) == [0, 1, 3, 4, 5, 7, 9]
    assert coarse({2, 5}, 100) == [2, 5]
    assert coarse({3}, 2) == [3]
    assert coarse(range(6), 4) == [0, 1, 2, 3, 4, 5]


def test_an_epsilon_network_leaps_as_ddim(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM's leap to a node is DDIM's own step on the chain without the nodes between."""
    levels = torch.linspace(0.1, 1.0, STEPS + 1, dtype=torch.float64)
    fine = toy_objective(Prfl(ddim(levels), 0, steps_range=(0.7, 0.8)), stride=2)  # m is 6 or 7
    for step in range(4):
        (m,) = fine.method.plan(step).plan.trains
        path = way_back({m, m + 1}, 2)
        alone = toy_objective(Prfl(ddim(levels[path]), 0))
        step_plan = Prfl(alone.method.schedule, 0, steps_range=(1 - 1 / (len(path) - 1), 1.0)).plan(step)
        monkeypatch.setattr(alone, "plan", lambda step, step_plan=step_plan: step_plan)
        alone.accumulate(step, INDICES)
        expected = take_gradients(alone)
        fine.accumulate(step, INDICES)
        for key, gradient in take_gradients(fine).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chain", [flow_sde(CHAIN.sigmas, 0.7), unipc(CHAIN.sigmas)], ids=["stochastic", "multistep"])
def test_solvers_that_cannot_leap_are_refused(chain) -> None:
    objective = toy_objective(Prfl(chain, 0, steps_range=(0.5, 1.0)), stride=2)
    with pytest.raises(PrflError, match="leap from node"):
        objective.accumulate(0, INDICES)
    replace(objective, stride=1).accumulate(0, INDICES)
