"""Dropout in an adapter: a chain's rollout and the steps that are computed again are of one thinned network."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone, LoraSpec, load_backbone
from prfl.backbone.dropout import dropouts
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.preference import Preference
from prfl.objective.reward_gradient import RewardGradient
from prfl.objective.sft import Sft
from prfl.reward import LatentReward, RewardAdapter, RewardHead
from prfl.utils import rng
from prfl.utils.errors import PrflError
from tests.objective import naive
from tests.objective.parts import (
    PROMPTS,
    SHAPE,
    assert_same_gradients,
    clips,
    latent_objective,
    stir,
    take_gradients,
)
from tests.objective.test_methods import CHAIN, INDICES, METHODS, toy_world, wan_world
from tests.objective.toy import toy_objective


def seeds(objective: RewardGradient, step: int) -> Tensor:
    return rng.seeds(objective.seed, "dropout/policy", step, INDICES)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    whole = sum(float(gradient.norm()) for gradient in expected.values())
    return sum(float((found[key] - expected[key]).norm()) for key in expected) / whole


SOME = ["prfl", "refl, from data", "full_chain", "draft_lv", "drtune", "leapalign", "dense_process, damped"]


@pytest.mark.parametrize("name", SOME)
def test_equals_the_joint_graph_with_the_same_masks_in_float64(name: str) -> None:
    method, loop = METHODS[name]
    objective = toy_objective(method)
    for step in range(3):
        loop(toy_world(objective, step), method, step).backward()
        whole = take_gradients(objective)
        objective.backbone.dropout = 0.4
        with objective.backbone.adapter("policy", seeds(objective, step)):
            loop(toy_world(objective, step), method, step).backward()
        expected = take_gradients(objective)
        objective.accumulate(step, INDICES)
        found = take_gradients(objective)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-11)
        assert errors(found, whole) > 1e-2, "dropout does something"
        objective.backbone.dropout = 0.0


@pytest.mark.parametrize("name", ["prfl", "full_chain", "dense_process"])
def test_other_masks_in_the_recomputation_are_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, loop = METHODS[name]
    objective = toy_objective(method)
    objective.backbone.dropout = 0.4
    with objective.backbone.adapter("policy", seeds(objective, 1)):
        loop(toy_world(objective, 1), method, 1).backward()
    expected = take_gradients(objective)
    velocity = objective.backbone.velocity

    def redrawn(latents: Tensor, *others: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            objective.backbone.seeds = objective.backbone.seeds + 1
        return velocity(latents, *others)

    monkeypatch.setattr(objective.backbone, "velocity", redrawn)
    objective.accumulate(1, INDICES)
    assert errors(take_gradients(objective), expected) > 1e-2


def with_dropout(backbone: Backbone) -> Backbone:
    backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q", "to_v", "ffn.net.2"], dropout=0.4))
    stir(backbone, "policy", seed=3)
    return backbone


PLANS = {"one edge": Prfl(CHAIN, 0), "several edges": Vader(CHAIN, 0, 2)}


@pytest.mark.parametrize("plan", PLANS)
def test_on_wan_with_and_without_checkpointing_and_kernels(tiny_backbone: Backbone, plan: str) -> None:
    objective = latent_objective(with_dropout(tiny_backbone), PLANS[plan], distance_every=1)
    loop = METHODS["prfl"][1] if plan == "one edge" else lambda world, *_: naive.truncated(world, 2)
    loop(wan_world(objective, 1), objective.method, 1).backward()
    whole = take_gradients(objective)
    with tiny_backbone.adapter("policy", seeds(objective, 1)):
        loop(wan_world(objective, 1), objective.method, 1).backward()
    expected = take_gradients(objective)
    assert errors(expected, whole) > 1e-2
    for checkpointing, kernels in (("none", False), ("full", False), ("attention", False), ("full", True)):
        tiny_backbone.running.checkpointing = checkpointing
        if kernels:
            tiny_backbone.use_kernels()
        metrics = objective.accumulate(1, INDICES)
        assert_same_gradients(take_gradients(objective), expected)
        assert all(layer.seeds is None for layer in dropouts(tiny_backbone.transformer))
        first = metrics["distance"] if checkpointing == "none" else first
        assert metrics["distance"] == pytest.approx(first, rel=1e-4)


def test_a_batch_split_over_processes_is_dropped_alike(tiny_backbone: Backbone) -> None:
    objective = latent_objective(with_dropout(tiny_backbone), Vader(CHAIN, 0, 2), distance_every=0)
    objective.accumulate(1, INDICES)
    whole = take_gradients(objective)
    for index in reversed(INDICES):
        objective.accumulate(1, [index])
    assert_same_gradients({name: gradient / 2 for name, gradient in take_gradients(objective).items()}, whole)


def test_the_distance_and_what_is_drawn_are_not_dropped(tiny_backbone: Backbone, tmp_path: Path) -> None:
    objective = latent_objective(with_dropout(tiny_backbone), Prfl(CHAIN, 0))
    _, condition, start = objective.draw(1, INDICES)
    with tiny_backbone.adapter("policy"), torch.no_grad():
        velocity = tiny_backbone.velocity(start, torch.tensor(0.5), condition)
        for layer in dropouts(tiny_backbone.transformer):
            layer.rate = 0.0  # of the same function, were it drawn
        assert torch.equal(tiny_backbone.velocity(start, torch.tensor(0.5), condition), velocity)


def test_a_checkpointed_block_refuses_other_masks(tiny_backbone: Backbone) -> None:
    backbone = with_dropout(tiny_backbone)
    backbone.running.checkpointing = "full"
    latents, condition = torch.randn(2, *SHAPE), backbone.condition(PROMPTS[:2])
    with ExitStack() as stack:
        stack.enter_context(backbone.adapter("policy"))
        with backbone.adapter("policy", torch.tensor([1, 2])):
            loss = backbone.velocity(latents, torch.tensor(0.5), condition).square().mean()
        with pytest.raises(PrflError, match="computed again with other dropout masks"):
            loss.backward()


def test_sft_and_a_reward_of_its_own_adapter_train_with_dropout(tiny_pipeline_folder: Path) -> None:
    """Each sample its own mask, whatever the batch; both sides of a pair have one; and none where it scores."""

    def sft(rate: float) -> Sft:
        backbone = load_backbone(tiny_pipeline_folder)
        backbone.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q", "ffn.net.2"], dropout=rate))
        stir(backbone, "policy", seed=3)
        return Sft(backbone, clips(SHAPE, {prompt: backbone.condition([prompt]) for prompt in ("", *PROMPTS)}), seed=0)

    def preference(rate: float, loss: str) -> Preference:
        backbone = load_backbone(tiny_pipeline_folder)
        torch.manual_seed(0)
        head = RewardHead(backbone.facts.widths[0], ["light"], blocks=1, inner=16, heads=2, hidden=16)
        adapter = RewardAdapter(2, 4.0, ("to_q", "ffn.net.2"), dropout=rate)
        reward = LatentReward(head, backbone, [1], adapter=adapter)
        stir(backbone, "reward", seed=4)
        data = clips(SHAPE, {prompt: backbone.condition([prompt]) for prompt in PROMPTS})
        data.prompts[:] = [PROMPTS[0]] * 3
        data.labels["light"] = torch.tensor([0.0, 1.0, 0.5])
        return Preference(reward, data, seed=0, loss=loss)

    for make in (sft, lambda rate: preference(rate, "bce"), lambda rate: preference(rate, "bradley_terry")):
        plain, dropping = make(0.0), make(0.4)
        plain.accumulate(1, INDICES)
        whole = take_gradients(plain)
        dropping.accumulate(1, INDICES)
        found = take_gradients(dropping)
        assert errors(found, whole) > 1e-2
        for index in reversed(INDICES):
            dropping.accumulate(1, [index])
        assert_same_gradients({name: gradient / 2 for name, gradient in take_gradients(dropping).items()}, found)
    batch, sigma, noise = dropping.draw(1, INDICES)
    inputs = batch.latents, torch.tensor(0.3), batch.condition
    plain.reward.load_state(dropping.reward.state())
    torch.testing.assert_close(dropping.reward(*inputs), plain.reward(*inputs))
