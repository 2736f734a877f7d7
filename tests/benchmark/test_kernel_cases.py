"""The kernels' cases on the tiny shapes: every provider computes the same, and a mistake planted in ours is seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import kernel_cases
from bench.cases.kernel_cases import CEILING, COMPILED, LIGER, OURS, OURS_COMPILED, cases
from bench.harness.measure import Measurement, first_runs, measure, outputs, saved_bytes
from bench.harness.problem import Case, Unavailable, build, prepare
from tests.slow import slow_unless

TINY = cases("tiny")
SLOW = (COMPILED, OURS_COMPILED, LIGER)  # half a minute each; Liger wants a GPU
MISTAKES = {
    "lora_linear": ("lora_linears", lambda right: lambda x, p, **more: right(1.02 * x, p, **more)),
    "qk_norm_rope": ("qk_norm_rope", lambda right: lambda q, k, *more, **own: right(q.roll(2, -1), k, *more, **own)),
    "gated_residual_norm": ("gated_residual_norm", lambda right: lambda x, y, g, *more: right(x, y, 1.1 * g, *more)),
}


def quick(case: Case) -> tuple[str, ...]:
    return tuple(name for name in case.providers if name not in SLOW)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_all_providers_compute_the_same(case: Case) -> None:
    problem = build(case)
    assert set(case.providers) <= problem.works.keys()
    works, found = first_runs(problem, quick(case))
    assert list(works) == list(quick(case)), found
    for name, each in found.items():
        assert isinstance(each, Measurement)
        assert bool(each.errors) == (name != CEILING) and all(error < 0.03 for error in each.errors.values())
    assert (problem.flops > 0) != (problem.moved > 0)
    if case.settings["mode"] != "forward" and case.operation not in ("attention", "gradient_step"):  # both save no less
        assert saved_bytes(works[OURS]) < 0.6 * saved_bytes(works["eager"])
    ours = found[OURS]
    assert isinstance(ours, Measurement)
    gradients = [name for name in ours.errors if name.startswith("d ")]
    assert bool(gradients) == (case.settings["mode"] != "forward")


@pytest.mark.parametrize("operation", slow_unless("lora_linear".__eq__, MISTAKES))
def test_a_planted_mistake_is_seen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = MISTAKES[operation]
    right: Any = getattr(kernel_cases, name)
    monkeypatch.setattr(kernel_cases, name, plant(right))
    case = next(case for case in TINY if case.operation == operation and case.settings["mode"] == "both")
    _, found = measure(replace(case, memory=False), (OURS, CEILING), 0.0, 1)
    assert isinstance(found[OURS], AssertionError) and "did not compute what eager did" in str(found[OURS])
    assert isinstance(found[CEILING], Measurement)


def test_without_a_gpu_ours_is_called_what_it_is() -> None:
    problem = build(TINY[0])
    ours = problem.names.get(OURS, OURS)
    assert ours == ("ours" if torch.cuda.is_available() else "ours (torch path)")


def test_wans_shapes_say_what_they_need() -> None:
    large = {(case.operation, case.settings["tokens"]): case for case in cases("wan-14b")}
    assert {tokens for _, tokens in large} == {32760, 75600}
    assert all(case.needs.gpu and case.needs.gib > 25 for case in large.values())
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="needs a GPU with 67 GiB"):
            build(large["wan_block", 75600])


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_the_ceiling_of_a_block_does_what_a_block_cannot_do_without(mode: str) -> None:
    case = next(case for case in TINY if case.operation == "wan_block" and case.settings["mode"] == mode)
    problem = build(case)
    work = prepare(problem, CEILING)
    # Attention taken apart, which torch counts on a CPU; its backward is then twice, not two and a half times, as much.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs(work)
    attention = 4 * 80 * (80 + 16) * 128
    assert counter.get_total_flops() == problem.flops - (attention / 2 if mode == "both" else 0)
