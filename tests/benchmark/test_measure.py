"""Turns, agreement, saved bytes and memory in a process of its own, on a case of one addition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prfl.benchmark import facts
from prfl.benchmark.measure import Found, interleaved, measure, memory_alone, quantiles, saved_bytes
from prfl.benchmark.problem import MODES, Case, Needs, Problem, Unavailable, Work, build, differentiated
from prfl.benchmark.results import time_ratio, time_ratio_apart
from tests.benchmark.conftest import CASE, adding

CPU = torch.device("cpu")
BRIEF = replace(CASE, memory=False)


def test_providers_take_turns_after_the_warm_up() -> None:
    ran: list[str] = []
    works = {name: Work(lambda _, name=name: ran.append(name)) for name in "abc"}  # type: ignore[misc]
    found = interleaved(works, 0.0, 4, CPU)
    assert ran[-12:] == ["a", "b", "c"] * 4
    assert set(ran[:-12]) == {"a", "b", "c"}
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_what_comes_before_is_done_before_every_run_and_is_given_to_it() -> None:
    given: list[int] = []
    work = Work(lambda state: given.append(state), iter(range(100)).__next__)  # type: ignore[func-returns-value]
    interleaved({"a": work}, 0.0, 2, CPU)
    assert given == list(range(len(given)))


def test_figures_of_every_provider() -> None:
    problem, found = measure(BRIEF, BRIEF.providers, 0.0, 3)
    assert problem.reference == "plain" and list(found) == ["plain", "other", "ceiling"]
    for each in found.values():
        assert isinstance(each, Found) and len(each.seconds) == 3
    assert found["other"].against == "float64" and 0 <= found["other"].errors["y"] < 1e-6
    assert found["ceiling"].errors == {}


def test_a_provider_that_computes_something_else_fails_alone() -> None:
    _, found = measure(BRIEF, ("other", "wrong"), 0.0, 2)
    assert isinstance(found["wrong"], AssertionError)
    assert "wrong did not compute what plain did: y" in str(found["wrong"])
    assert isinstance(found["other"], Found)


def test_without_float64_the_reference_is_the_measure() -> None:
    def without(width: int) -> Problem:
        return replace(adding(width), exact=None, tolerance=1e-3)

    _, found = measure(replace(BRIEF, build=without), ("other", "wrong"), 0.0, 2)
    assert isinstance(found["other"], Found) and found["other"].against == "plain"
    assert isinstance(found["wrong"], AssertionError)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(Unavailable, match="adding needs no_such_package"):
        build(replace(CASE, needs=Needs(packages=("no_such_package",))))

    def importing(width: int) -> Problem:
        import no_such_package  # noqa: F401

        return adding(width)

    with pytest.raises(Unavailable, match="no_such_package is not installed"):
        build(replace(CASE, build=importing))
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="needs a GPU with 30 GiB"):
            build(replace(CASE, needs=Needs(gpu=True, gib=30.0)))


def test_modes() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    want = {"y": torch.tensor([1.0, 4.0]), "d x": torch.tensor([6.0, 12.0])}
    for mode in MODES:
        work = differentiated(lambda: {"y": x**2}, {"x": x}, {"y": torch.full((2,), 3.0)}, mode)
        found = work.run(work.before())
        assert found is not None
        names = {"forward": ["y"], "backward": ["d x"], "both": ["y", "d x"]}[mode]
        assert {name: value.tolist() for name, value in found.items()} == {name: want[name].tolist() for name in names}


def test_saved_bytes_leave_out_what_is_there_anyway() -> None:
    x, weight = torch.ones(10, requires_grad=True), torch.ones(10)
    call = lambda: {"y": (x * weight).sin()}  # noqa: E731
    for constant, floats in ((), 20), ((weight,), 10):
        assert saved_bytes(differentiated(call, {"x": x}, {"y": x.detach()}, "both", constant)) == 4 * floats


def growing(mebibytes: int) -> Problem:
    def run(_: object) -> dict[str, torch.Tensor]:
        return {"y": torch.ones(mebibytes * 2**18)[:1].clone()}

    return Problem({"plain": lambda: Work(run)}, "plain", torch.float32)


def test_the_peak_is_that_of_a_process_of_its_own() -> None:
    found = [memory_alone(Case("growing", growing, {"mebibytes": size}, ("plain",)), "plain") for size in (64, 8)]
    assert [63 <= found[0]["peak"] / 2**20 < 80, 7 <= found[1]["peak"] / 2**20 < 24] == [True, True]
    assert found[0]["total"] == found[0]["baseline"] + found[0]["peak"]


def test_what_goes_wrong_in_that_process_comes_back() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such'"):
        memory_alone(CASE, "no such")


def test_ratios_of_medians_with_intervals() -> None:
    fast, slow = [1.0, 1.1, 0.9, 1.0, 30.0], [2.0, 2.2, 1.8, 2.0, 2.1]
    found = time_ratio(slow, fast)
    assert found.value == pytest.approx(2.0) and found.low <= 2.0 <= found.high  # one hiccup moves the median little
    assert time_ratio([3.0, 1.0, 2.0, 4.0], [1.0] * 4).value == pytest.approx(2.5)  # the middle of an even number
    assert time_ratio_apart([4.0] * 5, [2.0] * 9).value == pytest.approx(2.0)
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0])[0] == 3.0


def test_pairs_are_narrower_than_two_runs() -> None:
    """A machine that changes its pace changes both of a pair."""
    pace = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    double = [2 * each for each in pace]
    paired, apart = time_ratio(double, pace), time_ratio_apart(double, pace)
    assert paired.high - paired.low < 1e-9 < apart.high - apart.low


def test_share_of_the_roofline() -> None:
    share = facts.roofline(1e-3, 989e9 / 2, 0.0, torch.bfloat16, "NVIDIA H200")
    assert share == pytest.approx(0.5)
    assert facts.roofline(1e-3, 0.0, 4.8e9, torch.bfloat16, "NVIDIA H200") == pytest.approx(1.0)
    assert facts.roofline(1e-3, 1e9, 0.0, torch.bfloat16, "Some other device") is None
    assert facts.roofline(1e-3, 1e9, 0.0, torch.float64, "NVIDIA H200") is None


def test_facts_and_sources() -> None:
    found = facts.facts("random")
    words = {
        "/usr/bin/pytest": "pytest x", "/usr/lib/pytest/__main__.py": "python -m pytest x",
        f"{facts.REPOSITORY}/bench/a.py": "python bench/a.py x", "bench/a.py": "python bench/a.py x",
    }  # fmt: skip
    assert {first: facts.command([first, "x"]) for first in words} == words
    assert {"command", "machine", "versions", "commit", "sources", "weights"} == found.keys()
    assert found["versions"]["torch"] == torch.__version__
    assert facts.sources(("kernels",)) != facts.sources(("prfl/benchmark",)) and len(facts.sources()) == 12
