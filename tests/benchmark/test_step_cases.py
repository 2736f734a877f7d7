"""Steps on the shapes world: what must agree does, what was planted is seen, what cannot run says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.cases import step_problem
from bench.cases.rival_cases import KERNELS, OURS, RIVAL
from bench.cases.step_cases import LATENT, PLAIN, cases
from bench.harness import worlds
from bench.harness.measure import Measurement, first_runs, measure, outputs, timed
from bench.harness.problem import Case, Problem, Unavailable, Work, prepare
from bench.harness.problem import build as build_case
from bench.harness.report import EVALUATIONS, GRADIENTS, HEAD, cells
from bench.harness.results import Row, figures
from prfl.estimate.live_tensors import SavedBytes
from prfl.factory.reward import TrainableReward
from tests.slow import slow_unless

TINY = {case.operation: case for case in cases("tiny")}


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time that is taken here is looked at, and a run takes half a second."""
    monkeypatch.setattr("bench.harness.measure.warmed", lambda work, device: 0.0)


def small(operation: str) -> Case:
    """A chain of three steps."""
    case = TINY[operation]
    return replace(case, settings={**case.settings, "chain": 3}, memory=False)


@pytest.mark.slow
@pytest.mark.parametrize("operation", slow_unless("rival_prfl".__eq__, ["rival_prfl", "rival_vader"]))
def test_the_rival_computes_what_we_do(operation: str) -> None:
    problem = build_case(small(operation))
    works, found = first_runs(problem, (RIVAL, OURS))
    ours = found[OURS]
    assert isinstance(ours, Measurement), ours
    assert ours.errors.keys() == {"loss", "d A", "d B"}
    assert all(error < 1e-4 for error in ours.errors.values())  # float32, three network calls and a decoder
    assert problem.names[KERNELS] == "ours, kernels"
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="kernels run on a GPU"):
            prepare(problem, KERNELS)
    again = outputs(works[OURS])  # weights and gradients were put back
    first = outputs(works[OURS])
    assert again is not None and first is not None
    assert all(torch.equal(again[name], first[name]) for name in first)


def another_time(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def velocity(transformer: Any, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return right(transformer, latents, sigma * 0.98, text)

    return velocity


@pytest.mark.slow
def test_a_difference_planted_in_the_rival_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = import_module("bench.rival")
    monkeypatch.setattr(script, "velocity", another_time(script.velocity))
    _, found = first_runs(build_case(small("rival_prfl")), (OURS,))
    assert isinstance(found[OURS], AssertionError) and "did not compute what rival did" in str(found[OURS])


@pytest.mark.slow
def test_a_gradient_that_only_the_clamp_takes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    script: Any = import_module("bench.rival")
    right = script.decode
    monkeypatch.setattr(script, "decode", lambda *given: right(*given).clamp(-0.3, 0.3))
    _, found = first_runs(build_case(small("rival_vader")), (OURS,))
    assert isinstance(found[OURS], AssertionError)


@pytest.mark.slow
def test_the_same_step_has_the_same_rollout_whatever_the_reward() -> None:
    case = small("same_step")
    problem, found = measure(case, case.providers, 0.0, 1)
    for name, each in found.items():
        assert isinstance(each, Measurement), each
        assert all(error == 0 for error in each.errors.values()) and each.errors.keys() == {"sampled_step", "latents 5"}
        assert set(each.parts) == {"rollout", "reward", "decode", "backward", "optimizer"}
        assert (each.parts["decode"] > 0) == (name != LATENT) and min(each.parts.values()) >= 0
        assert sum(each.parts.values()) <= max(each.seconds)
        row = Row(name, figures(case, name, problem, each, found[LATENT]), worlds.REPOSITORY)  # type: ignore[arg-type]
        line = dict(zip(HEAD, cells(row), strict=True))
        assert line["steps/s"] != "-" and line["rollout ms"] != "-" and (line["decode ms"] == "-") == (name == LATENT)
    kept = [each.saved_bytes for each in found.values() if isinstance(each, Measurement) and each.saved_bytes]
    assert list(found)[1:] == ["pixel_1", "pixel_4", "pixel_all", PLAIN]
    assert kept[1] < kept[2] <= kept[3] < 0.3 * kept[4]  # more frames, and all that a decoder makes of them


def test_a_plain_decoder_leaves_the_blocks_checkpointed() -> None:
    stage, own = step_problem.Stage("tiny"), worlds.config("tiny")
    model, _, decoder = stage.model(own)
    latents = torch.zeros(1, *model.latent_shape(5, 24, 32), requires_grad=True)
    kept = {}
    for decoder.plain in (False, True):
        with SavedBytes() as saved:
            model.decode(latents)
        kept[decoder.plain] = saved.peak
        assert model.running.checkpointing == own.backbone.checkpointing == "full"
    assert kept[False] < 0.5 * kept[True]


def test_a_plain_decoder_of_wans_says_why_it_is_not_there() -> None:
    (case,) = (case for case in cases("wan-1.3b") if case.operation == "same_step")
    with pytest.raises(Unavailable, match="keeps everything"):
        prepare(case.build(**case.settings), PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("planted", [lambda noise: noise * (1 + 1e-5), lambda noise: noise.roll(1, -1)])
def test_other_noise_is_no_same_step(planted: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pixel side alone: a little larger, or the same numbers elsewhere."""
    right = step_problem.Stage.objective

    def objective(stage: step_problem.Stage, own: Any) -> Any:
        made = right(stage, own)
        draw = made.draw

        def other(*given: Any) -> Any:
            *rest, noise = draw(*given)
            return *rest, planted(noise)

        if own.reward.space == "pixel":
            made.draw = other  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(step_problem.Stage, "objective", objective)
    _, found = first_runs(build_case(small("same_step")), ("pixel_1",))
    wrong = found["pixel_1"]
    assert isinstance(wrong, AssertionError) and "did not compute what latent did: latents" in str(wrong)
    assert isinstance(found[LATENT], Measurement)


def test_evaluations_are_those_that_were_made() -> None:
    """A chain of 6, the middle step 3 with its edge held: 3 forwards, 1 with its backward and again for it, the reward
    on 4 of 6 blocks; VADER's K = 5: 6 forwards to the end, then 5 of that kind."""
    case = TINY["methods"]
    problem = build_case(case)
    expected = {"prfl": 3 + 3 + 1 + 3 * 4 / 6, "vader_5": 6 + 5 * 4, "full_chain": 6 + 6 * 4 + 3 * 4 / 6}
    for name, evaluations in expected.items():
        assert prepare(problem, name).facts[EVALUATIONS] == pytest.approx(evaluations), name
    gradients = {"prfl": 1, "reuse": 1, "vader_5": 5, "full_chain": 6}
    for name, steps in gradients.items():
        assert prepare(problem, name).facts[GRADIENTS] == steps, name


def test_ours_with_kernels_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def step_work(stage: Any, own: Any, **_: Any) -> Work:
        asked.append(own.backbone)
        return Work(lambda _: None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bench.cases.rival_cases.step_work", step_work)
    for operation in ("rival_prfl", "rival_vader"):
        problem = build_case(small(operation))
        for name in (OURS, KERNELS):
            prepare(problem, name)
    assert [own.kernels for own in asked] == ["auto", "triton"] * 2


@pytest.mark.slow
def test_each_method_has_a_gradient_and_reuse_counts_by_the_step() -> None:
    problem = build_case(TINY["methods"])
    for name in ("dense", "reuse"):
        work = prepare(problem, name)
        assert outputs(work) is None and work.check() == ""
        assert work.repeats == (4 if name == "reuse" else 1)


def test_a_gradient_that_is_zero_or_not_finite_is_named() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    trained = step_problem.Trained({"w": weight})
    assert "not there" in trained.wrong()
    weight.grad = torch.zeros(2)
    assert "zero" in trained.wrong()
    weight.grad = torch.tensor([1.0, torch.nan])
    assert "not finite" in trained.wrong()
    weight.grad = torch.ones(2)
    assert trained.wrong() == ""
    trained.put_back()
    assert weight.grad is None


def checked() -> Problem:
    wrong = {"good": "", "bad": "its gradient is zero"}
    works = {name: lambda why=why: Work(lambda _: None, check=lambda: why) for name, why in wrong.items()}
    return Problem(works, "good", torch.float32)


def test_a_provider_whose_check_fails_is_not_timed() -> None:
    _, found = measure(Case("checked", checked, {}, ("good", "bad"), memory=False), ("good", "bad"), 0.0, 1)
    assert isinstance(found["bad"], AssertionError) and "gradient is zero" in str(found["bad"])
    assert isinstance(found["good"], Measurement) and found["good"].seconds


def test_seconds_are_those_of_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 8.0])
    monkeypatch.setattr("bench.harness.measure.time.perf_counter", lambda: next(clock))
    assert timed(Work(lambda _: None, repeats=4), torch.device("cpu")) == 2.0


@pytest.mark.parametrize("world", ["wan-1.3b", "wan-14b"])
def test_wans_worlds_say_what_they_need(world: str) -> None:
    for case in cases(world):
        assert case.needs.gpu and case.needs.gib >= 16
        if not torch.cuda.is_available():
            with pytest.raises(Unavailable, match="needs a GPU with"):
                build_case(case)
    own = worlds.config(world)
    assert own.backbone.checkpointing == "full" and own.backbone.dtype == "bfloat16"
    assert worlds.weights(own) == "random"


@pytest.mark.slow
def test_random_weights_are_the_same_for_both_sides() -> None:
    own = worlds.config("small")
    model, plain = worlds.backbone(own), worlds.transformer(own)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.transformer.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, theirs[name.replace(".base_layer.", ".")]), name
    assert 90e6 < sum(parameter.numel() for parameter in plain.parameters()) < 150e6
    condition = model.condition(["a cat", "a dog runs"])
    assert (
        condition.tensors["lengths"].tolist() == [6, 11] and condition.tensors["prompt_embeds"][0, 6:].abs().max() == 0
    )
    reward = worlds.reward("small", own, model)
    assert isinstance(reward, TrainableReward) and not any(p.requires_grad for p in reward.parameters().values())
