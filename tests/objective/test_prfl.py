"""PRFL's two-phase step against a plain joint-graph loop on real Wan blocks, and what it must refuse."""

from __future__ import annotations

import pytest
import torch

from prfl.backbone.network import add_copy
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.prfl import Prfl
from prfl.reward import total
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.guidance import Guidance
from prfl.rollout.solvers import euler
from prfl.utils.errors import PrflError
from tests.objective.parts import (
    LOSS,
    PROMPTS,
    assert_same_gradients,
    joint_graph_chain,
    latent_objective,
    pixel_objective,
    take_gradients,
    with_policy,
)
from tests.slow import slow_unless

CHAIN = euler(chain_sigmas(5, 3.0))
INDICES = [0, 1]


def joint_gradients(objective, step):
    """Rollout, reward and backward in one graph, no plans, no walk."""
    m = objective.method.plan(step).node - 1
    x, condition = joint_graph_chain(objective, step, INDICES, m, m + 1)
    sigma = CHAIN.sigmas[m + 1].float().expand(len(x))
    scores = objective.scorer.reward(x, sigma, condition)
    per_sample, _ = objective.loss(scores)
    per_sample.mean().backward()
    return take_gradients(objective)


@pytest.mark.parametrize("checkpointing", slow_unless("attention".__eq__, ["none", "attention", "full"]))
@pytest.mark.parametrize("own_adapter", [True, False])
def test_equals_the_joint_graph(tiny_backbone, own_adapter, checkpointing):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0), own_adapter=own_adapter)
    drawn = set()
    for step in range(4):
        expected = joint_gradients(objective, step)
        tiny_backbone.running.checkpointing = checkpointing
        metrics = objective.accumulate(step, INDICES)
        tiny_backbone.running.checkpointing = "none"
        assert_same_gradients(take_gradients(objective), expected)
        drawn.add(metrics["node"])
    assert len(drawn) > 1
    assert tiny_backbone.active_adapter is None


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_all_weights_are_trained_in_a_copy_beside_the_base(tiny_backbone, checkpointing):
    """Full fine-tuning: the same gradient as the joint graph's, and a reward that the policy's steps do not move."""
    add_copy(tiny_backbone, "policy")
    objective = latent_objective(tiny_backbone, Prfl(CHAIN, seed=0), own_adapter=True)
    before = {name: p.detach().clone() for name, p in tiny_backbone.transformer.named_parameters()}
    latents = torch.randn(2, *objective.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = tiny_backbone.condition(PROMPTS[:2])
    scores = objective.scorer.reward(latents, torch.tensor(0.5), condition)
    for step in range(2):
        expected = joint_gradients(objective, step)
        tiny_backbone.running.checkpointing = checkpointing
        metrics = objective.accumulate(step, INDICES)
        tiny_backbone.running.checkpointing = "none"
        found = take_gradients(objective)
        assert_same_gradients(found, expected)
        for name, parameter in objective.parameters().items():
            parameter.data -= 10 * found[name]
    assert metrics["sampled_step"] == metrics["node"] - 1
    assert objective.accumulate(objective.distance_every, INDICES)["distance"] > 0
    with tiny_backbone.adapter("policy"):  # the reward leaves the policy, wherever it is called
        again = objective.scorer.reward(latents, torch.tensor(0.5), condition)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    assert all(torch.equal(before[name], p) for name, p in tiny_backbone.transformer.named_parameters())


def test_the_comparison_catches_a_wrong_seed(tiny_backbone):
    """The same states, with the reward read one sigma off: far outside the tolerance."""
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    expected = joint_gradients(objective, 0)
    scorer = objective.scorer
    object.__setattr__(scorer, "reward", Shifted(scorer.reward))
    objective.accumulate(0, INDICES)
    with pytest.raises(AssertionError):
        assert_same_gradients(take_gradients(objective), expected)


def Shifted(reward):
    call = type(reward).logits
    reward.logits = lambda latents, sigma, condition: call(reward, latents, sigma * 0.7, condition)
    return reward


def test_the_batch_in_two_halves_is_the_batch(tiny_backbone):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    objective.accumulate(1, [4, 5, 6, 7])
    whole = take_gradients(objective)
    for half in ([4, 5], [6, 7]):
        objective.accumulate(1, half)
    assert_same_gradients({name: g / 2 for name, g in take_gradients(objective).items()}, whole)


def test_unit_step_weight_scales_the_whole_gradient(tiny_backbone):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    objective.accumulate(0, INDICES)
    native = take_gradients(objective)
    m = objective.method.plan(0).node - 1
    sizes = CHAIN.sigmas.diff().abs()
    objective.step_weight = "unit"
    objective.accumulate(0, INDICES)
    factor = float(sizes.mean() / sizes[m])
    assert abs(factor - 1) > 0.05
    assert_same_gradients(take_gradients(objective), {name: factor * g for name, g in native.items()})


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_clean_handoff_scores_the_clean_prediction(tiny_backbone, checkpointing):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0, handoff="clean"))
    step = 1
    m = objective.method.plan(step).node.source
    x, condition = joint_graph_chain(objective, step, INDICES, 99, m)
    with tiny_backbone.adapter("policy"):
        clean = x - CHAIN.sigmas[m].float() * tiny_backbone.velocity(x, CHAIN.sigmas[m].float(), condition)
    objective.loss(objective.scorer.reward(clean, torch.zeros(2), condition))[0].mean().backward()
    expected = take_gradients(objective)
    tiny_backbone.running.checkpointing = checkpointing
    assert objective.accumulate(step, INDICES)["sigma"] == 0.0
    assert_same_gradients(take_gradients(objective), expected)


@pytest.mark.parametrize("gradient", ["cond", "both"])
def test_guidance(tiny_backbone, gradient):
    objective = latent_objective(
        with_policy(tiny_backbone), Prfl(CHAIN, seed=0), guidance=Guidance(scale=3.0, gradient=gradient)
    )
    m = objective.method.plan(0).node - 1
    _, condition, x = objective.draw(0, INDICES)
    empty, sigmas = tiny_backbone.condition(["", ""]), CHAIN.sigmas.float()
    for i in range(m + 1):
        with tiny_backbone.adapter("policy"), torch.set_grad_enabled(i == m):
            conditional = tiny_backbone.velocity(x, sigmas[i], condition)
            unconditional = tiny_backbone.velocity(x, sigmas[i], empty)
            if gradient == "cond":
                unconditional = unconditional.detach()
            x = x + (sigmas[i + 1] - sigmas[i]) * (unconditional + 3.0 * (conditional - unconditional))
    objective.loss(objective.scorer.reward(x, sigmas[m + 1].expand(2), condition))[0].mean().backward()
    expected = take_gradients(objective)
    objective.accumulate(0, INDICES)
    assert_same_gradients(take_gradients(objective), expected)


def test_the_step_is_drawn_over_the_range_and_shared():
    method = Prfl(CHAIN, seed=0)
    assert {method.plan(step).node for step in range(60)} == {1, 2, 3, 4, 5}
    assert method.plan(7).node == Prfl(CHAIN, seed=0).plan(7).node
    assert {Prfl(CHAIN, seed=0, steps_range=(0.0, 0.4)).plan(step).node for step in range(40)} == {1, 2}
    with pytest.raises(PrflError, match="no step of the chain"):
        Prfl(CHAIN, seed=0, steps_range=(0.4, 0.4)).plan(0)


def test_the_rollout_stops_where_the_reward_is_read(tiny_backbone):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0), distance_every=0)
    velocity, calls = tiny_backbone.velocity, []
    tiny_backbone.velocity = lambda *inputs: calls.append(1) or velocity(*inputs)
    for checkpointing, again in (("none", 1), ("attention", 0), ("full", 0)):  # they keep the one edge's graph
        tiny_backbone.running.checkpointing = checkpointing
        for step in range(3):
            calls.clear()
            node = objective.accumulate(step, INDICES)["node"]
            assert len(calls) == node + again


def test_a_reward_that_does_not_know_noise_is_refused(tiny_backbone):
    with pytest.raises(PrflError, match="not noise-aware"):
        pixel_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    pixel_objective(tiny_backbone, Prfl(CHAIN, seed=0, handoff="clean"))
    pixel_objective(tiny_backbone, Prfl(CHAIN, seed=0, steps_range=(0.8, 1.0)))  # the last step ends at sigma 0


def test_a_reward_without_gradient_is_refused(tiny_backbone, monkeypatch):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    reward = objective.scorer.reward
    logits = reward.logits
    reward.logits = lambda latents, *rest: logits(latents.detach(), *rest)
    with pytest.raises(PrflError, match="gives no gradient to the latents"):
        objective.accumulate(0, INDICES)
    reward.logits = lambda latents, *rest: {k: v * 0 for k, v in logits(latents, *rest).items()}
    with pytest.raises(PrflError, match="gives no gradient to the latents"):
        objective.accumulate(0, INDICES)
    reward.differentiable = False
    with pytest.raises(PrflError, match="the reward has none"):
        latent_objective_again(objective)


def latent_objective_again(objective):
    return type(objective)(
        objective.backbone, objective.method, objective.scorer, LOSS, PROMPTS, objective.latent_shape
    )


def test_loss_shapes():
    scores = {"motion": torch.tensor([0.0, 3.0], requires_grad=True), "look": torch.tensor([1.0, 1.0])}
    hinge = RewardLoss({"motion": 1.0}, shape="hinge", target=2.0, scale=0.1)
    loss, reward = hinge(scores)
    torch.testing.assert_close(loss, torch.tensor([0.2, 0.0]))
    assert torch.equal(reward, scores["motion"])
    loss.sum().backward()
    torch.testing.assert_close(scores["motion"].grad, torch.tensor([-0.1, 0.0]))
    linear, _ = RewardLoss({"motion": 1.0, "look": 2.0}, shape="linear", scale=0.5)(scores)
    torch.testing.assert_close(linear, torch.tensor([-1.0, -2.5]))
    shaped, reward = RewardLoss({"motion": 1.0}, aggregate="logsigmoid", shape="linear", scale=1.0)(scores)
    assert torch.equal(reward, total(scores, {"motion": 1.0}, "logsigmoid"))


def test_a_hinge_that_every_sample_meets_gives_zero_and_no_error(tiny_backbone):
    met = RewardLoss({"motion": 1.0}, shape="hinge", target=-1e6)
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0), loss=met)
    assert objective.accumulate(0, INDICES)["loss"] == 0.0
    assert all(float(g.abs().max()) == 0 for g in take_gradients(objective).values())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_distance_takes_no_call_with_gradient_of_its_own(tiny_backbone, monkeypatch, checkpointing):
    """Where the step's own velocity is the distance's, the gradient is that of a call of its own; else it makes one."""
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0), distance_weight=7.0)
    tiny_backbone.running.checkpointing = checkpointing
    calls: list[bool] = []
    velocity = tiny_backbone.velocity
    counted = lambda *inputs: calls.append(torch.is_grad_enabled()) or velocity(*inputs)  # noqa: E731
    monkeypatch.setattr(tiny_backbone, "velocity", counted)
    distance = objective.accumulate(0, INDICES)["distance"]
    shared = take_gradients(objective)
    assert sum(calls) == 1
    monkeypatch.setattr("prfl.objective.reward_gradient.shares_call", lambda *_: False)
    assert objective.accumulate(0, INDICES)["distance"] == pytest.approx(distance, rel=1e-5)
    assert sum(calls) == 3
    assert_same_gradients(shared, take_gradients(objective))


def test_distance_to_the_base(tiny_backbone):
    """As a metric it has no gradient; as a regulariser exactly the gradient of its weight times it."""
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0), distance_every=2)
    measured = objective.accumulate(0, INDICES)["distance"]
    without = take_gradients(objective)
    assert "distance" not in objective.accumulate(1, INDICES)
    take_gradients(objective)
    objective.distance_weight = 7.0
    assert objective.accumulate(0, INDICES)["distance"] == pytest.approx(measured, rel=1e-5)
    both = take_gradients(objective)
    m = objective.method.plan(0).node - 1
    x, condition = joint_graph_chain(objective, 0, INDICES, 99, m)
    sigma = CHAIN.sigmas[m].float()
    base = tiny_backbone.velocity(x, sigma, condition).detach()
    with tiny_backbone.adapter("policy"):
        value = (tiny_backbone.velocity(x, sigma, condition) - base).square().mean()
        (7.0 * value).backward()
    assert float(value) == pytest.approx(measured, rel=1e-4)
    alone = take_gradients(objective)
    assert_same_gradients(both, {name: without[name] + alone[name] for name in alone})


def test_the_failed_batch_can_be_described(tiny_backbone):
    objective = latent_objective(with_policy(tiny_backbone), Prfl(CHAIN, seed=0))
    tensors, facts = objective.describe(3, [6, 7])
    node = objective.method.plan(3).node
    assert list(facts["nodes"]) == [str(node)] and len(facts["prompts"]) == 2
    x, _ = joint_graph_chain(objective, 3, [6, 7], 99, node)
    torch.testing.assert_close(tensors[f"scored/{node}"], x, rtol=1e-4, atol=1e-5)
