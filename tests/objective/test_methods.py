"""Every reward-gradient method against its naive loop: in float64 on a toy network, and on real Wan blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.objective.methods.alignprop import AlignProp
from prfl.objective.methods.base import Method
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.draft_lv import DraftLv
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.instructvideo import InstructVideo
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.steps import starts_from_data
from prfl.objective.methods.vader import Vader
from prfl.objective.reward_gradient import RewardGradient
from prfl.reward.frames import draw_frames
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.plan import Clean, Node, Renoised, StepPlan, last_steps, unit_steps
from prfl.rollout.solvers import euler
from prfl.utils import rng
from prfl.utils.errors import PrflError
from tests.models import copied
from tests.objective import naive
from tests.objective.parts import (
    PROMPTS,
    SHAPE,
    assert_same_gradients,
    clips,
    latent_objective,
    pixel_objective,
    take_gradients,
    with_policy,
)
from tests.objective.toy import LOSS, toy_objective
from tests.slow import slow_unless

STEPS = 5
CHAIN = euler(chain_sigmas(STEPS, 3.0))
INDICES = [3, 4]


def draft_lv(world: naive.World, method: DraftLv, step: int) -> Tensor:
    shape = world.start.shape[1:]
    names = [f"noised/{2 * STEPS + 1 + 2 * copy}" for copy in range(method.copies)]
    noises = [rng.normal(shape, 0, name, step, INDICES).to(world.start) for name in names]
    return naive.low_variance(world, noises)


def drtune(world: naive.World, method: DrTune, step: int) -> Tensor:
    end = method.end(step)
    return naive.stopped_inputs(world, method.drawn(step, end + 1), end if method.early_stop else None)


def leapalign(world: naive.World, method: LeapAlign, step: int) -> Tensor:
    k, j = sorted(method.plan(step).plan.trains)
    return naive.two_leaps(world, k, j, method.alpha, method.similarity_floor)


def dense(world: naive.World, method: DenseProcess, step: int) -> Tensor:
    drawn = method.drawn(step)
    first = drawn[0] if method.starts_from_data(step) else 0
    return naive.dense(world, drawn, method.beta, method.credit, method.handoff, first)


def prfl(world: naive.World, method: Prfl, step: int) -> Tensor:
    (m,) = trained(method, step)
    if not starts_from_data(method.from_data, 0, step):
        return naive.one_step(world, m) if method.handoff == "next" else naive.one_prediction(world, m)
    if method.handoff == "next":
        return naive.one_step_from(world, m, world.start)
    return world.end(world.start - world.sigmas[m] * world.velocity(world.start, world.sigmas[m]))


def trained(method: Method, step: int) -> frozenset[int]:
    return method.plan(step).plan.trains


METHODS: dict[str, tuple[Method, Callable]] = {
    "prfl": (Prfl(CHAIN, 0), prfl),
    "prfl, from data": (Prfl(CHAIN, 0, from_data=0.6), prfl),
    "refl": (Prfl(CHAIN, 0, handoff="clean", steps_range=(0.4, 1.0)), prfl),
    "refl, from data": (Prfl(CHAIN, 0, handoff="clean", from_data=1.0), prfl),
    "draft_k": (Vader(CHAIN, 0, 3), lambda w, own, step: naive.truncated(w, 3)),
    "full_chain": (Vader(CHAIN, 0, STEPS), lambda w, own, step: naive.truncated(w, STEPS)),
    "alignprop": (AlignProp(CHAIN, 0), lambda w, own, step: naive.truncated(w, len(trained(own, step)))),
    "draft_lv": (DraftLv(CHAIN, 0, 2), draft_lv),
    "drtune": (DrTune(CHAIN, 0, 2), drtune),
    "drtune, random, early stop": (DrTune(CHAIN, 0, 2, spacing="random", early_stop=0.6), drtune),
    "leapalign": (LeapAlign(CHAIN, 0), leapalign),
    "leapalign, high floor": (LeapAlign(CHAIN, 1, alpha=0.6, similarity_floor=0.7), leapalign),
    "leapalign, no weights": (LeapAlign(CHAIN, 2, similarity_floor=None), leapalign),
    "instructvideo": (InstructVideo(CHAIN, 0, 2, last_steps=2), lambda w, own, step: naive.truncated(w, 2, first=2)),
    "dense_process": (DenseProcess(CHAIN, 0, rewards=3), dense),
    "dense_process, from data": (DenseProcess(CHAIN, 0, rewards=3, from_data=0.6), dense),
    "dense_process, exact": (DenseProcess(CHAIN, 1, rewards=2, beta=1.0), dense),
    "dense_process, damped": (DenseProcess(CHAIN, 2, rewards=2, beta=0.3), dense),
    "dense_process, each its step": (DenseProcess(CHAIN, 3, rewards=4, credit="step"), dense),
    "dense_process, clean": (DenseProcess(CHAIN, 4, rewards=3, handoff="clean"), dense),
    "dense_process, clean, exact": (DenseProcess(CHAIN, 5, rewards=2, handoff="clean", beta=1.0), dense),
    "dense_process, clean, each its step": (DenseProcess(CHAIN, 6, rewards=4, handoff="clean", credit="step"), dense),
}


def start_of(objective: RewardGradient, step: int) -> Tensor:
    """What the chain starts from, without ``RewardGradient.draw``."""
    first, shape = objective.method.plan(step).first, objective.latent_shape
    noise = rng.normal(shape, objective.seed, "start", step, INDICES)
    if first == 0:
        return noise
    order = rng.permutation(3, objective.seed, "order/clips", 1)
    clean = torch.stack([objective.clips.latents[order[index % 3]] for index in INDICES])
    sigma = float(CHAIN.sigmas[first])
    return (1 - sigma) * clean + sigma * noise


# ------------------------------------------------------------------------------------------------- toy, in float64


def toy_world(objective: RewardGradient, step: int) -> naive.World:
    prompts, condition, _ = objective.draw(step, INDICES)
    if objective.method.plan(step).first:
        order = rng.permutation(3, objective.seed, "order/clips", 1)
        assert prompts == [PROMPTS[::-1][order[index % 3]] for index in INDICES], "a clip goes with its own prompt"
    return naive.World(
        start_of(objective, step).double(),
        CHAIN.sigmas,
        lambda x, sigma: objective.backbone.velocity(x, sigma, condition),
        lambda x, sigma: LOSS(objective.scorer(x, sigma.expand(len(x)), condition, step))[0],
    )


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_naive_loop_in_float64(name: str) -> None:
    method, loop = METHODS[name]
    objective = toy_objective(method)
    drawn = set()
    for step in range(5):
        loss = loop(toy_world(objective, step), method, step)
        loss.backward()
        expected = take_gradients(objective)
        metrics = objective.accumulate(step, INDICES)
        found = take_gradients(objective)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-11)
        if "similarity" not in metrics:
            assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
        drawn.add((trained(method, step), metrics["node"]))
    assert len(drawn) > 1 or name in ("draft_k", "full_chain", "draft_lv", "instructvideo"), "the draws vary"


@pytest.mark.parametrize("name", ["draft_lv", "leapalign", "instructvideo", "dense_process"])
def test_the_batch_in_two_halves_is_the_batch(name: str) -> None:
    objective = toy_objective(METHODS[name][0])
    objective.accumulate(1, [3, 4])
    whole = take_gradients(objective)
    for index in (3, 4):
        objective.accumulate(1, [index])
    for key, gradient in take_gradients(objective).items():
        torch.testing.assert_close(gradient / 2, whole[key], rtol=1e-9, atol=1e-11)


def renoised_to(step_plan: StepPlan, i: int) -> StepPlan:
    def moved(node: Node) -> Node:
        if isinstance(node, Clean):
            return Clean(moved(node.source))
        return replace(node, i=i) if isinstance(node, Renoised) else node

    plan, edges = step_plan.plan, []
    for edge in plan.edges:
        b = {moved(k): factor for k, factor in edge.b.items()}
        edges.append(replace(edge, source=moved(edge.source), target=moved(edge.target), b=b))
    beta = {moved(k): share for k, share in plan.beta.items()}
    plan = replace(plan, edges=edges, trains=frozenset(map(moved, plan.trains)), beta=beta)
    return replace(step_plan, plan=plan, seeds={moved(node): share for node, share in step_plan.seeds.items()})


PLANTED = {
    "another beta": ("leapalign", lambda c: replace(c, plan=replace(c.plan, beta=dict.fromkeys(c.plan.beta, 0.5)))),
    "no weights": ("leapalign", lambda c: replace(c, similarity=None)),
    "one seed less": ("dense_process", lambda c: replace(c, seeds=dict(list(c.seeds.items())[1:]))),
    "a step not trained": (
        "drtune", lambda c: replace(c, plan=replace(c.plan, trains=frozenset(sorted(c.plan.trains)[:-1]))),
    ),
    "credit for other steps": (
        "dense_process, each its step",
        lambda c: replace(c, plan=replace(c.plan, edges=[replace(edge, through=1.0) for edge in c.plan.edges])),
    ),
    "a chain from noise": ("prfl, from data", lambda c: replace(c, first=0)),
    "another level of the new noise": ("draft_lv", lambda c: renoised_to(c, STEPS - 2)),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_the_comparison_catches(plant: str) -> None:
    name, spoil = PLANTED[plant]
    method, loop = METHODS[name]
    objective = toy_objective(method)
    objective.plan = lambda step: spoil(method.plan(step))  # type: ignore[method-assign]
    wrong = []
    for step in range(5):
        loop(toy_world(objective, step), method, step).backward()
        expected = take_gradients(objective)
        objective.accumulate(step, INDICES)
        found = take_gradients(objective)
        error = sum(float((found[k] - expected[k]).norm()) for k in expected)
        wrong.append(error / sum(float(g.norm()) for g in expected.values()))
    assert max(wrong) > 1e-2


# ------------------------------------------------------------------------------------------------- real Wan blocks


def wan_world(objective: RewardGradient, step: int) -> naive.World:
    backbone, scorer = objective.backbone, objective.scorer
    _, condition, _ = objective.draw(step, INDICES)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        with backbone.adapter("policy"):
            return backbone.velocity(x, sigma, condition)

    def loss(x: Tensor, sigma: Tensor) -> Tensor:
        if scorer.reward.space == "latent":
            return objective.loss(scorer.reward(x, sigma.expand(len(x)), condition))[0]
        assert sigma == 0
        return objective.loss(scorer.reward(backbone.decode(x), condition))[0]

    return naive.World(start_of(objective, step), CHAIN.sigmas.float(), velocity, loss)


@pytest.fixture(scope="module")
def with_adapter(loaded_tiny_backbone: Backbone) -> Backbone:
    return with_policy(copied(loaded_tiny_backbone))


@pytest.fixture
def tiny_policy(with_adapter: Backbone) -> Backbone:
    """A fresh model for each test, with its adapter."""
    return copied(with_adapter)


def wan_objective(backbone: Backbone, method: Method, space: str, **more) -> RewardGradient:
    data = clips(SHAPE, {prompt: backbone.condition([prompt]) for prompt in PROMPTS})
    make = latent_objective if space == "latent" else pixel_objective
    return make(backbone, method, distance_every=0, clips=data, **more)


# Each method once; one of each shape of plan with recomputation, and through the decoder.
SHAPES_OF_PLANS = ("prfl", "draft_k", "draft_lv", "leapalign", "dense_process")
ON_WAN = slow_unless(
    lambda case: case[1:] == ("latent", "none") or (case[0] in SHAPES_OF_PLANS and case[1:] != ("pixel", "full")),
    [
        (name, space, checkpointing)
        for name, space, checkpointing in product(METHODS, ("latent", "pixel"), ("none", "full"))
        if not (space == "pixel" and METHODS[name][0].noisy and checkpointing == "full")  # refused before it is read
    ],
)


@pytest.mark.parametrize("name, space, checkpointing", ON_WAN)
def test_equals_the_naive_loop_on_wan(tiny_policy: Backbone, name: str, space: str, checkpointing: str) -> None:
    method, loop = METHODS[name]
    if space == "pixel" and method.noisy:
        with pytest.raises(PrflError, match="not noise-aware"):
            wan_objective(tiny_policy, method, space)
        return
    objective = wan_objective(tiny_policy, method, space)
    loop(wan_world(objective, 1), method, 1).backward()
    expected = take_gradients(objective)
    tiny_policy.running.checkpointing = checkpointing
    objective.accumulate(1, INDICES)
    assert_same_gradients(take_gradients(objective), expected)


def test_frames_that_are_scored_one_by_one(tiny_policy: Backbone) -> None:
    """InstructVideo's segments and temporal weights, through the decoder."""
    method = InstructVideo(CHAIN, 0, 3)
    objective = wan_objective(tiny_policy, method, "pixel", frames=2)
    objective.scorer = replace(objective.scorer, temporal_decay=0.5)
    chosen = draw_frames(3, 2, seed=0, step=1)
    shown = {0: [0], 1: [1, 2, 3, 4], 2: [5, 6, 7, 8]}
    world, condition = wan_world(objective, 1), objective.draw(1, INDICES)[1]

    def loss(x: Tensor, sigma: Tensor) -> Tensor:
        mixed = torch.stack([x[:, :, t] if t in chosen else x[:, :, t].detach() for t in range(3)], dim=2)
        pixels = tiny_policy.decode(mixed)
        total = 0
        for t in chosen:
            scores = objective.scorer.reward(pixels[:, :, shown[t]], condition, torch.tensor(shown[t]) / 8)
            weight = torch.exp(torch.tensor(-0.5 * abs(t - 1)))
            total = total + weight / 2 * (scores["motion"] - 0.5 * scores["look"])
        return -3.0 * total

    naive.truncated(replace(world, loss=loss), 1, first=3).backward()
    expected = take_gradients(objective)
    objective.accumulate(1, INDICES)
    assert_same_gradients(take_gradients(objective), expected)


@pytest.mark.parametrize("name", slow_unless(SHAPES_OF_PLANS.__contains__, METHODS))
def test_latent_methods_never_call_the_vae(tiny_policy: Backbone, monkeypatch, name: str) -> None:
    def called(*_, **__):
        raise AssertionError("the VAE was called")

    for part in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        monkeypatch.setattr(getattr(tiny_policy.vae, part), "forward", called)
    objective = wan_objective(tiny_policy, METHODS[name][0], "latent")
    for step in range(2):
        objective.accumulate(step, INDICES)
        objective.describe(step, INDICES)
    if name == "refl":  # this would see it
        with pytest.raises(AssertionError, match="the VAE was called"):
            objective = pixel_objective(tiny_policy, METHODS[name][0])
            objective.accumulate(0, INDICES)


# ------------------------------------------------------------------------------------------------- draws and weights


def test_draws_are_shared_by_the_batch_and_the_same_again() -> None:
    for name, (method, _) in METHODS.items():
        again = replace(method)  # type: ignore[type-var]
        assert [method.plan(step) for step in range(5)] == [again.plan(step) for step in range(5)], name


def test_unit_steps_brings_every_trained_evaluation_to_the_mean_step() -> None:
    mean = float(CHAIN.sigmas.diff().abs().mean())
    for name, (method, _) in METHODS.items():
        plan = unit_steps(CHAIN, method.plan(3).plan)
        for k in plan.trains:
            sizes = [abs(edge.b[k]) for edge in plan.edges if edge.source == k]
            assert plan.step_weight[k] * max(sizes) == pytest.approx(mean), name
    assert len(set(unit_steps(CHAIN, last_steps(CHAIN, 5)).step_weight.values())) == 5


@pytest.mark.parametrize("name", ["full_chain", "refl", "leapalign, no weights"])
def test_unit_step_weight_scales_each_steps_own_gradient(name: str) -> None:
    """Steps one at a time, the others' parameters left out: so their own gradients are seen."""
    method = METHODS[name][0]
    plan = method.plan(2).plan
    whole = toy_objective(method, step_weight="unit")
    whole.accumulate(2, INDICES)
    found, weights = take_gradients(whole), unit_steps(CHAIN, plan).step_weight
    total: dict[str, Tensor] = {}
    for k in plan.trains:
        alone = toy_objective(method)
        step_plan = replace(method.plan(2), plan=replace(plan, trains=frozenset({k})))
        alone.plan = lambda step, step_plan=step_plan: step_plan  # type: ignore[method-assign]
        alone.accumulate(2, INDICES)
        for key, gradient in take_gradients(alone).items():
            total[key] = total.get(key, 0) + weights[k] * gradient
    for key in found:
        torch.testing.assert_close(found[key], total[key], rtol=1e-9, atol=1e-11)


def test_chains_from_data_need_clips() -> None:
    objective = toy_objective(InstructVideo(CHAIN, 0, 2))
    objective.clips = None
    with pytest.raises(PrflError, match="start from clips of the data"):
        objective.accumulate(0, INDICES)
