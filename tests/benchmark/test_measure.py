"""Turns, agreement, saved bytes and memory in a process of its own, on a case of one addition."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import facts
from bench.harness import measure as measuring
from bench.harness.measure import Measurement, interleaved, measure, memory_alone, quantiles, saved_bytes
from bench.harness.problem import MODES, Case, Needs, Problem, Unavailable, Work, build, differentiated
from bench.harness.results import time_ratio, time_ratio_apart
from tests.benchmark.conftest import CASE, adding
from tests.slow import slow_unless

CPU = torch.device("cpu")
BRIEF = replace(CASE, memory=False)


def test_providers_take_turns_after_the_warm_up() -> None:
    ran: list[str] = []
    works = {name: Work(lambda _, name=name: ran.append(name)) for name in "abc"}  # type: ignore[misc]
    found, failed = interleaved(works, 0.0, 4, CPU)
    assert not failed and ran[-12:] == ["a", "b", "c"] * 4
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
        assert isinstance(each, Measurement) and len(each.seconds) == 3
    assert found["other"].against == "float64" and 0 <= found["other"].errors["y"] < 1e-6
    assert found["ceiling"].errors == {}


def test_a_provider_that_computes_something_else_fails_alone() -> None:
    _, found = measure(BRIEF, ("other", "wrong"), 0.0, 2)
    assert isinstance(found["wrong"], AssertionError)
    assert "wrong did not compute what plain did: y" in str(found["wrong"])
    assert isinstance(found["other"], Measurement)


def test_without_float64_the_reference_is_the_measure() -> None:
    def without(width: int) -> Problem:
        return replace(adding(width), exact=None, tolerance=1e-3)

    _, found = measure(replace(BRIEF, build=without), ("other", "wrong"), 0.0, 2)
    assert isinstance(found["other"], Measurement) and found["other"].against == "plain"
    assert isinstance(found["wrong"], AssertionError)


def failing(after: int, error: Exception) -> Callable[..., Problem]:
    """``adding`` with a provider whose run ``after`` others fails."""

    def made(width: int) -> Problem:
        x, runs = torch.linspace(0, 1, width), iter(range(100))

        def run(_: object) -> dict[str, torch.Tensor]:
            if next(runs) >= after:
                raise error
            return {"y": 2 * x + 1}

        problem = adding(width)
        return replace(problem, works={**problem.works, "failing": lambda: Work(run)})

    return made


NO_ROOM = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@pytest.mark.parametrize(
    "after", slow_unless((2).__eq__, [0, 2, 4])
)  # in the first run, warming up, in the first round
def test_one_that_has_no_room_takes_no_other_with_it(after: int) -> None:
    case = replace(BRIEF, build=failing(after, NO_ROOM))
    _, found = measure(case, ("failing", "other"), 0.0, 3)
    assert isinstance(found["failing"], Unavailable) and "out of memory: CUDA out of memory." in str(found["failing"])
    for name in ("plain", "other"):
        own = found[name]
        assert isinstance(own, Measurement) and len(own.seconds) == 3 and own.saved_bytes is not None


def test_what_was_timed_stays_where_the_rest_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight runs: the first, three to warm up, three rounds and the one that saved bytes are counted in."""

    def broken(case: Case, name: str) -> dict[str, int]:
        if name == "other":
            raise RuntimeError("its process ended with -9")
        return {"peak": 1}

    monkeypatch.setattr(measuring, "memory_alone", broken)
    case = replace(CASE, build=failing(7, RuntimeError("no more")))
    _, found = measure(case, ("failing", "other"), 0.0, 3)
    failed, other, plain = (found[name] for name in ("failing", "other", "plain"))
    assert isinstance(failed, Measurement) and isinstance(other, Measurement) and isinstance(plain, Measurement)
    assert len(failed.seconds) == 3 and failed.lacks == {"saved bytes": "no more"} and failed.memory == {"peak": 1}
    assert len(other.seconds) == 3 and other.lacks == {"memory": "its process ended with -9"} and not other.memory
    assert plain.lacks == {} and plain.memory


def test_float64_that_has_no_room_leaves_the_reference_to_compare_with() -> None:
    def exact() -> dict[str, torch.Tensor]:
        raise NO_ROOM

    _, found = measure(replace(BRIEF, build=lambda width: replace(adding(width), exact=exact)), ("other",), 0.0, 2)
    assert isinstance(found["other"], Measurement) and found["other"].against == "plain"


class Stage:
    """What a case's works hold, as the weights of a model."""


@pytest.mark.slow
def test_the_models_are_gone_when_the_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref] = []

    def made(width: int) -> Problem:
        problem, stage = failing(0, ValueError("a mistake"))(width), Stage()
        alive.append(weakref.ref(stage))

        def work(name: str) -> Work:
            def run(given: object) -> object:
                return stage and own.run(given)

            own = problem.works[name]()
            return Work(run)  # type: ignore[arg-type]

        return replace(problem, works={name: lambda name=name: work(name) for name in problem.works})

    measured = []

    def memory(case: Case, name: str) -> dict[str, int]:
        assert alive and alive[0]() is None
        measured.append(name)
        return {}

    monkeypatch.setattr(measuring, "memory_alone", memory)
    problem, found = measure(replace(CASE, build=made), ("other", "failing"), 0.0, 2)
    assert measured == ["plain", "other"] and problem.reference == "plain"
    assert "in run" in "".join(found["failing"].__notes__)  # type: ignore[union-attr]  # its traceback is told

    wrong = replace(CASE, build=lambda width: replace(made(width), reference="failing"))
    alive.clear()
    with pytest.raises(AssertionError, match="the reference cannot run: a mistake") as kept:
        measure(wrong, ("plain",), 0.0, 2)
    gc.collect()
    assert alive[0]() is None and kept.value


def test_two_providers_outputs_are_not_held_at_once() -> None:
    alive: list[weakref.ref] = []

    def run(_: object) -> dict[str, torch.Tensor]:
        assert sum(ref() is not None for ref in alive[1:]) == 0  # the first is the reference's
        found = torch.ones(3)
        alive.append(weakref.ref(found))
        return {"y": found}

    works = {name: lambda: Work(run) for name in "abc"}
    ready, found = measuring.first_runs(Problem(works, "a", torch.float32), "abc")
    assert list(ready) == ["a", "b", "c"] and all(isinstance(each, Measurement) for each in found.values())
    assert len(alive) == 3  # and each has run once


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


@pytest.mark.slow
def test_the_peak_is_that_of_a_process_of_its_own() -> None:
    found = [memory_alone(Case("growing", growing, {"mebibytes": size}, ("plain",)), "plain") for size in (64, 8)]
    assert [63 <= found[0]["peak"] / 2**20 < 80, 7 <= found[1]["peak"] / 2**20 < 24] == [True, True]
    assert found[0]["total"] == found[0]["baseline"] + found[0]["peak"]


def with_history(mebibytes: int, freed: int) -> Problem:
    """A run that needs ``mebibytes`` and one more, after a freed tensor has taught glibc not to map such blocks."""

    def run(_: object) -> dict[str, torch.Tensor]:
        if freed:
            torch.ones(freed * 2**18)
        first = torch.ones(mebibytes * 2**18)
        small = [torch.ones(1000) for _ in range(50)]  # above the first in the heap, and alive
        del first
        return {"y": torch.ones((mebibytes + 1) * 2**18)[:1].clone(), "small": small[0]}

    return Problem({"plain": lambda: Work(run)}, "plain", torch.float32)


@pytest.mark.slow
def test_the_peak_does_not_depend_on_what_was_freed_before() -> None:
    sizes = [{"mebibytes": 16, "freed": freed} for freed in (0, 20)]
    found = [memory_alone(Case("history", with_history, each, ("plain",)), "plain") for each in sizes]
    assert [16 <= each["peak"] / 2**20 < high for each, high in zip(found, (20, 24), strict=True)] == [True, True]


def averaging() -> Problem:
    """A step that leaves 8 MiB behind, 16 in all with what it needs while it runs."""
    left: list[torch.Tensor] = []

    def run(_: object) -> None:
        left[:] = left or [torch.ones(8 * 2**18)]
        torch.ones(8 * 2**18)

    return Problem({"plain": lambda: Work(run, forget=left.clear)}, "plain", torch.float32)


def test_what_a_step_leaves_behind_is_in_its_peak() -> None:
    found = memory_alone(Case("averaging", averaging, {}, ("plain",)), "plain")
    assert 15 <= found["peak"] / 2**20 < 18


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


def test_which_kernel_torchs_attention_takes() -> None:
    """A fused one, as the profiler sees it, for a video; and the bias of a text is asked about by itself."""
    found = facts.sdpa()
    if not torch.cuda.is_available():
        x = torch.zeros(1, 2, 1024, 128)
        with torch.profiler.profile() as profile:
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
        assert any(f"scaled_dot_product_{found['video']}" in event.key for event in profile.key_averages())
    with sdpa_kernel(SDPBackend.MATH):
        assert facts.sdpa() | {"video": "math", "text": "math"} == facts.sdpa()


def test_facts_and_sources() -> None:
    found = facts.facts("random")
    words = {
        "/usr/bin/pytest": "pytest x", "/usr/lib/pytest/__main__.py": "python -m pytest x",
        f"{facts.REPOSITORY}/bench/a.py": "python bench/a.py x", "bench/a.py": "python bench/a.py x",
    }  # fmt: skip
    assert {first: facts.command([first, "x"]) for first in words} == words
    assert {"command", "machine", "versions", "sdpa", "commit", "sources", "weights"} == found.keys()
    assert found["versions"]["torch"] == torch.__version__
    assert facts.sources(("kernels",)) != facts.sources(("bench/harness",)) and len(facts.sources()) == 12
