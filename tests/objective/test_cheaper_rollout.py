"""A cheaper rollout: the gradient is the exact network's, at the states where the cheaper one has led."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.cheaper import EXACT, Cheaper
from prfl.backbone.wan.model import WanBackbone
from prfl.objective import reward_gradient
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.rollout import requirements
from prfl.rollout.guidance import Guidance
from prfl.rollout.plan import Clean
from prfl.rollout.solvers import unipc
from prfl.rollout.trajectory import Trajectory, rollout
from tests.objective import naive
from tests.objective.parts import SHAPE, assert_same_gradients, latent_objective, take_gradients, with_policy
from tests.objective.test_methods import CHAIN, INDICES, METHODS, STEPS, toy_world
from tests.objective.test_reuse import SPAN, indices_of, learn, reusing
from tests.objective.toy import ToyBackbone, toy_objective

ROUGH = Cheaper(products="float8")


class RoughBackbone(ToyBackbone):
    """Whose cheaper calls are off, and counted."""

    rough = False
    rough_calls = 0

    def cheaper(self, how: Cheaper, exact: Set[int]) -> RoughCalls:
        assert how == ROUGH
        return RoughCalls(self, exact)

    def velocity(self, latents: Tensor, sigma: Tensor, condition: object) -> Tensor:
        exact = super().velocity(latents, sigma, condition)
        self.rough_calls += self.rough
        return off(latents, exact) if self.rough else exact


def off(latents: Tensor, velocity: Tensor) -> Tensor:
    return velocity + 0.3 * torch.sin(3 * latents)


@dataclass
class RoughCalls:
    backbone: RoughBackbone
    exact: Set[int]
    cached: float | None = 0.25

    @contextmanager
    def at(self, node: int) -> Iterator[None]:
        assert not torch.is_grad_enabled()
        self.backbone.rough = node not in self.exact
        yield
        self.backbone.rough = False


def roughened(objective: RewardGradient) -> RewardGradient:
    objective.backbone = RoughBackbone()
    objective.cheaper = ROUGH
    return objective


def exact_at(method: object, step: int) -> set[int]:
    """The nodes that are trained, or passed through, and those that lead to what is scored."""
    step_plan = method.plan(step)
    nodes = {node for node in step_plan.plan.recomputed if isinstance(node, int)}
    jumps = {node.source for node in step_plan.seeds if isinstance(node, Clean) and isinstance(node.source, int)}
    return nodes | jumps | ({STEPS - 1} if STEPS in step_plan.seeds else set())


def rough_world(objective: RewardGradient, step: int) -> naive.World:
    """Where the network is off at every node but the exact ones, for whoever asks."""
    world, exact = toy_world(objective, step), exact_at(objective.method, step)
    sigmas = [float(CHAIN.sigmas[node]) for node in exact]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        found = world.velocity(x, sigma)
        return found if float(sigma) in sigmas else off(x, found)

    return replace(world, velocity=velocity)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_exact_networks_where_the_cheaper_led(name: str, checkpointing: str) -> None:
    method, loop = METHODS[name]
    objective = roughened(toy_objective(method))
    objective.backbone.running.checkpointing = checkpointing
    rough = 0
    for step in range(5):
        loop(rough_world(objective, step), method, step).backward()
        expected = take_gradients(objective)
        rough -= objective.backbone.rough_calls
        objective.accumulate(step, INDICES)
        rough += objective.backbone.rough_calls
        for key, gradient in take_gradients(objective).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-11)
    whole = method.plan(0).plan.trains == set(range(STEPS)) or method.plan(0).first > 0
    assert rough > 0 or whole, "some of the rollout was cheaper"


SPOILT = {
    "a trained step that is not exact": (lambda step_plan, path: frozenset(), "draft_k"),
    "the last step before the reward": (lambda step_plan, path: step_plan.plan.recomputed, "drtune"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_comparison_catches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, method = SPOILT[name]
    monkeypatch.setattr(requirements, "exact_nodes", nodes)
    with pytest.raises(AssertionError, match="not close"):
        test_the_gradient_is_the_exact_networks_where_the_cheaper_led(method, "none")


def test_a_multistep_solvers_earlier_outputs_are_part_of_the_state() -> None:
    """UniPC's last step has cheaper outputs as constants, those that its states were made of."""
    solver = unipc(CHAIN.sigmas)
    objective = roughened(toy_objective(Vader(solver, 0, 1)))
    _, condition, x = objective.draw(0, INDICES)
    backbone, outputs = objective.backbone, {}
    for i in range(STEPS):
        sigma = solver.sigmas[i]
        with torch.set_grad_enabled(i == STEPS - 1):
            outputs[i] = backbone.velocity(x, sigma, condition)
            outputs[i] = outputs[i] if i == STEPS - 1 else off(x, outputs[i])
            x = solver.a[i] * x + sum(factor * outputs[k] for k, factor in solver.b[i].items())
    scores = objective.scorer(x, torch.zeros(len(x)), condition, 0)
    objective.loss(scores)[0].mean().backward()
    expected = take_gradients(objective)
    for checkpointing in ("none", "full"):
        backbone.running.checkpointing = checkpointing
        objective.accumulate(0, INDICES)
        for key, gradient in take_gradients(objective).items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-6, atol=1e-9)


LATE = Prfl(CHAIN, 0, steps_range=(0.6, 1.0)), DenseProcess(CHAIN, 3, rewards=2, steps_range=(0.6, 1.0))


@pytest.mark.parametrize("method", LATE, ids=["prfl", "dense"])
def test_a_reused_rollouts_drift_is_the_policys_and_not_the_roundings(method: object) -> None:
    """While the policy does not change, its trained steps end where the rollout's did."""
    objective = roughened(reusing(method))
    for step in range(SPAN):
        metrics = objective.accumulate(step, indices_of(step))
        assert metrics.get("drift", 0.0) < 1e-12
    assert objective.backbone.rough_calls > 0
    learn(objective)
    assert objective.accumulate(SPAN, indices_of(SPAN))["rollout_age"] == 0


# ------------------------------------------------------------------------------------------------- the tiny network

WAYS = [Cheaper("float8", "int8"), Cheaper(cache=0.3), Cheaper("float8", "int8", 0.3)]
LAST = Vader(CHAIN, 0, 1)


def test_without_options_nothing_changes_bit_for_bit(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = latent_objective(with_policy(tiny_backbone), LAST, own_adapter=False)
    assert objective.cheaper == EXACT
    plain = objective.accumulate(0, INDICES)
    expected = take_gradients(objective)
    objective.cheaper = Cheaper(cache=1e-30)  # through all the code, and none skipped
    found = objective.accumulate(0, INDICES)
    assert found["rollout/cached"] == 0.0 and "rollout/cached" not in plain
    assert all(torch.equal(gradient, expected[name]) for name, gradient in take_gradients(objective).items())
    monkeypatch.setattr(WanBackbone, "cheaper", None)
    objective.cheaper = EXACT
    objective.accumulate(0, INDICES)


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_gradient_at_the_states_that_the_rollout_left(
    tiny_backbone: Backbone, how: Cheaper, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain autograd through the last step alone, from the latents where the rollout came to it."""
    backbone = with_policy(tiny_backbone)
    backbone.running.checkpointing = checkpointing
    objective = latent_objective(backbone, LAST, cheaper=how)
    left: list[Trajectory] = []
    monkeypatch.setattr(reward_gradient, "rollout", lambda *a, **k: left.append(rollout(*a, **k)) or left[-1])
    objective.accumulate(0, INDICES)
    found = take_gradients(objective)
    x = left[0].at(STEPS - 1)
    assert not torch.equal(x, exact_state(objective)), "and these are not the exact chain's"
    with backbone.adapter("policy"):
        condition = objective.draw(0, INDICES)[1]
        sigma = CHAIN.sigmas[STEPS - 1].float()
        end = x + float(CHAIN.b[STEPS - 1][STEPS - 1]) * backbone.velocity(x, sigma, condition)
    (seed,) = objective.score({STEPS: end.detach()}, objective.plan(0), condition, 0, None)[0].values()
    with backbone.adapter("policy"):
        end.backward(seed)
    assert_same_gradients(found, take_gradients(objective))


def exact_state(objective: RewardGradient) -> Tensor:
    _, condition, x = objective.draw(0, INDICES)
    with torch.no_grad(), objective.backbone.adapter("policy"):
        return rollout(objective.network(condition), x, CHAIN, last=STEPS - 1).at(STEPS - 1)


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_the_batch_in_two_halves_is_the_batch(tiny_backbone: Backbone, how: Cheaper) -> None:
    guidance = Guidance(2.0, "cond")
    objective = latent_objective(with_policy(tiny_backbone), LAST, own_adapter=False, cheaper=how, guidance=guidance)
    whole = objective.accumulate(0, [0, 1])
    expected = take_gradients(objective)
    halves = [objective.accumulate(0, [index]) for index in (0, 1)]
    if how.cache:
        assert whole["rollout/cached"] == pytest.approx(sum(half["rollout/cached"] for half in halves) / 2)
        assert whole["rollout/cached"] > 0
    assert_same_gradients({n: g / 2 for n, g in take_gradients(objective).items()}, expected)


def test_all_but_the_first_and_the_last_step_are_skipped(tiny_backbone: Backbone) -> None:
    objective = latent_objective(with_policy(tiny_backbone), LAST, own_adapter=False, cheaper=Cheaper(cache=1e9))
    assert objective.accumulate(0, INDICES)["rollout/cached"] == pytest.approx((STEPS - 2) / STEPS)
    assert objective.latent_shape == SHAPE


def test_a_resumed_run_makes_the_same_cheaper_rollout_again() -> None:
    """With the weights that the policy had when it was made; its share of skipped steps was told then."""
    runs = [roughened(reusing(LATE[0])) for _ in range(2)]
    assert runs[0].accumulate(0, indices_of(0))["rollout/cached"] == 0.25
    runs[1].load_state_dict(runs[0].state_dict())
    for objective in runs:
        take_gradients(objective)
        learn(objective)
        objective.backbone.rough_calls = 0
        metrics = objective.accumulate(1, indices_of(1))
        assert metrics["rollout_age"] == 1 and "rollout/cached" not in metrics
    assert runs[0].backbone.rough_calls == 0 < runs[1].backbone.rough_calls
    for found, expected in zip(*(take_gradients(objective).values() for objective in runs), strict=True):
        assert torch.equal(found, expected)
