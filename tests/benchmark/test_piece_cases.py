"""The pieces of a step on the tiny shapes: what computes the same agrees, and a planted mistake is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.cases.piece_cases import ALL, CHECKPOINTED, FOUR, LATENT, OFFLOAD, ONE, PLAIN, cases
from bench.harness.measure import Measurement, first_runs, outputs, saved_bytes
from bench.harness.problem import Case, Unavailable, build, prepare
from prfl.backbone.wan import vae as vae_codec
from tests.slow import slow_unless

TINY = cases("tiny")


def named(name: str) -> Case:
    return next(case for case in TINY if case.name == name)


@pytest.mark.parametrize("case", slow_unless(lambda case: case is TINY[0], TINY), ids=lambda case: case.name)
def test_all_providers_compute_the_same(case: Case) -> None:
    problem = build(case)
    here = [name for name in case.providers if OFFLOAD not in name or torch.cuda.is_available()]
    works, found = first_runs(problem, here)
    assert set(case.providers) <= problem.works.keys() and list(works) == here, found
    compared = {name: each.errors for name, each in found.items() if isinstance(each, Measurement) and each.errors}
    assert list(compared) == ([LATENT] if case.operation in ("score", "steer") else here)
    assert all(max(errors.values()) < 1e-4 for errors in compared.values())


@pytest.mark.slow
def test_what_a_score_and_a_decoder_keep() -> None:
    problem = build(named("score-tiny"))
    kept = {name: saved_bytes(prepare(problem, name)) for name in (LATENT, ONE, FOUR, ALL)}
    assert kept[LATENT] < kept[ONE] < kept[FOUR] < kept[ALL] and kept[ALL] > 5 * kept[LATENT]
    problem = build(named("decode-tiny-all-backward"))
    assert saved_bytes(prepare(problem, CHECKPOINTED)) < 0.2 * saved_bytes(prepare(problem, PLAIN))


def test_a_call_keeps_less_with_checkpoints_and_with_kernels() -> None:
    problem = build(named("gradient_call-tiny"))
    kept = {name: saved_bytes(prepare(problem, name)) for name in ("full", "none", "none, kernels")}
    assert kept["full"] < 0.1 * kept["none"] and kept["none, kernels"] < 0.7 * kept["none"]


@pytest.mark.slow
def test_a_planted_mistake_in_the_checkpointed_decoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = vae_codec.decode

    def wrong(vae: Any, latents: torch.Tensor, gradient_from: int = 0, checkpointed: bool = False) -> torch.Tensor:
        pixels = right(vae, latents, gradient_from, checkpointed)
        return pixels if checkpointed else 1.01 * pixels - 0.01 * pixels.detach()  # the gradient alone is wrong

    monkeypatch.setattr(vae_codec, "decode", wrong)
    case = named("decode-tiny-all-backward")
    _, found = first_runs(build(case), (CHECKPOINTED, PLAIN))
    assert isinstance(found[PLAIN], AssertionError) and "d latents" in str(found[PLAIN])
    assert isinstance(found[CHECKPOINTED], Measurement)


def test_offload_wants_a_gpu() -> None:
    problem = build(named("gradient_call-tiny"))
    if torch.cuda.is_available():
        assert outputs(prepare(problem, f"full, {OFFLOAD}"))
    else:
        with pytest.raises(Unavailable, match="what a GPU keeps"):
            prepare(problem, f"full, {OFFLOAD}")
