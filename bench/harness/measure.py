"""Time of several providers in turn in one process, agreement, saved bytes; the peak in a process of its own.

Providers take turns (warm-up apart, then A B C A B C ...), so that a machine that grows slower grows slower for all of
them, and a ratio of two of them is one of neighbouring rounds.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.harness.agreement import relative_errors, too_far
from bench.harness.problem import Case, Outputs, Problem, Unavailable, Work, build, prepare
from prfl.estimate.live_tensors import SavedBytes

WARMUPS = 3  # a provider's first runs compile, tune and fill caches; they are not timed
LONG = 3.0  # seconds of a run that one warm-up is enough for: the runs that compare are runs, too
ROUNDS = 200  # at most: more make large files and no narrower interval
FLUSHED = 256 * 2**20  # bytes written between two runs on a GPU, so that nothing is found in its cache
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
APART = 3.0  # providers may be so many times as far from float64 as the reference is, and still compute the same thing


@dataclass
class Measurement:
    """The figures of one provider."""

    seconds: list[float] = field(default_factory=list)  # of every round; a GPU's own clock where there is one
    saved_bytes: int | None = None  # for the backward pass, without weights; distinct storages
    errors: dict[str, float] = field(default_factory=dict)  # relative, of every output
    against: str = ""  # what the errors are relative to: float64, or the reference
    memory: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)  # seconds, of the median round's parts each
    facts: dict[str, float] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)  # what could not be measured of it, and why


def interleaved(
    works: Mapping[str, Work], seconds: float, least: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time every provider in rounds that all of them take part in; returns the seconds of every round.

    And the errors of those that failed in a round: they take no part from there on.
    seconds: for each provider, about; least: rounds, however long they take.
    """
    seconds_of: dict[str, list[float]] = {name: [] for name in works}
    failed: dict[str, Exception] = {}

    # Warm up, and see how long a run takes.
    longest = 0.0
    for name, work in works.items():
        try:
            longest = max(longest, warmed(work, device))
        except Exception as error:
            failed[name] = _reason(error)
    rounds = max(least, min(ROUNDS, int(seconds / max(longest, 1e-6))))

    # The rounds, without a garbage collection in the middle of one.
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in [name for name in works if name not in failed]:
                try:
                    seconds_of[name].append(timed(works[name], device))
                except Exception as error:
                    failed[name] = _reason(error)
    finally:
        if enabled:
            gc.enable()
    return seconds_of, failed


def warmed(work: Work, device: torch.device) -> float:
    """Warm a provider up; returns the seconds of a whole run."""
    first = timed(work, device) * work.repeats
    return first if first > LONG else min(timed(work, device) for _ in range(WARMUPS - 1)) * work.repeats


def timed(work: Work, device: torch.device) -> float:
    """Time one run; returns its seconds over its ``repeats``.

    On a GPU by its events, behind a write that empties its cache and hides launches.
    """
    prepared = work.before()
    if device.type != "cuda":
        start = time.perf_counter()
        result = work.run(prepared)
        taken = time.perf_counter() - start
        del result, prepared
        return taken / work.repeats

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_()
    begin.record()
    result = work.run(prepared)
    end.record()
    torch.cuda.synchronize()
    del result, prepared
    return begin.elapsed_time(end) / 1000 / work.repeats


def outputs(work: Work) -> Outputs | None:
    return work.run(work.before())


def saved_bytes(work: Work) -> int:
    """Return the most bytes that autograd keeps during one run, ``work.constant`` not counted."""
    with SavedBytes(work.constant) as saved:
        outputs(work)
    return saved.peak


class Expected(NamedTuple):
    """What every provider has to compute.  outputs: the reference's.  exact: in float64, or the reference's again."""

    outputs: Outputs
    exact: dict[str, Tensor]
    against: str

    def judge(self, problem: Problem, name: str, outputs: Outputs | None, figures: Measurement) -> None:
        """Fill in the errors of a provider that has outputs.  Raises AssertionError where they are other ones."""
        if outputs is None:
            return
        if outputs.keys() != self.outputs.keys():
            raise AssertionError(f"computed {', '.join(outputs)}; the reference {', '.join(self.outputs)}")
        figures.against, figures.errors = self.against, relative_errors(outputs, self.exact)
        if self.against != problem.reference:
            lines = too_far(outputs, self.outputs, self.exact, factor=APART)
        else:
            lines = [f"{key}: {error:.3g}" for key, error in figures.errors.items() if not error <= problem.tolerance]
        if lines:
            raise AssertionError(f"{name} did not compute what {problem.reference} did: {'; '.join(lines)}")


def expected(problem: Problem, outputs: Outputs | None) -> Expected | None:
    """Make what is expected of the reference's outputs; None where it has none: the providers are different things."""
    if outputs is None:
        return None
    exact, against = None, problem.reference
    if problem.exact:
        with suppress(torch.cuda.OutOfMemoryError):  # the reference will do, then
            exact, against = problem.exact(), problem.exact_is
    exact = exact or {name: value.double() for name, value in outputs.items()}
    return Expected(outputs, {name: exact[name] for name in outputs}, against)


def first_run(problem: Problem, name: str, expectation: Expected | None) -> tuple[Work, Measurement, Expected | None]:
    """Prepare a provider and run it once; returns what is expected, too, which the reference's run says.

    Raises AssertionError where it computed something else.
    """
    work = prepare(problem, name)
    outputs_of_run = outputs(work)
    if wrong := work.check():
        raise AssertionError(f"{name}: {wrong}")
    figures = Measurement(facts=dict(work.facts))
    if name == problem.reference:
        expectation = expected(problem, outputs_of_run)
    if expectation:
        expectation.judge(problem, name, outputs_of_run, figures)
    return work, figures, expectation


def first_runs(
    problem: Problem, providers: Sequence[str]
) -> tuple[dict[str, Work], dict[str, Measurement | Exception]]:
    """Run each provider once; returns those that computed what the reference did, and what was measured of all.

    Outputs are compared as they come: those of two providers are never held at once, beside the reference's.
    """
    works: dict[str, Work] = {}
    result: dict[str, Measurement | Exception] = {}
    expectation: Expected | None = None
    for name in dict.fromkeys([problem.reference, *providers]):
        try:
            works[name], result[name], expectation = first_run(problem, name, expectation)
        except Exception as error:  # one that cannot run takes no other with it
            result[name] = _reason(error)
        if problem.reference not in works:
            break
    return works, result


def measure(
    case: Case, providers: Sequence[str], seconds: float, least: int
) -> tuple[Problem, dict[str, Measurement | Exception]]:
    """Measure every provider, or say why it has no figures: Unavailable, AssertionError (another result), others.

    The reference takes part whether it is asked for or not.  The problem comes without its works.
    Raises Unavailable where the case itself cannot run.
    """
    try:
        problem, result = timings(case, providers, seconds, least)
    except Exception as error:
        raise _bare(error) from None
    release()  # the other process has a model of its own: this one's must be gone by then
    for name, figures in result.items():
        if case.memory and isinstance(figures, Measurement):
            try:
                figures.memory = memory_alone(case, name)
            except Exception as error:
                figures.lacks["memory"] = str(error)
    return problem, result


def timings(
    case: Case, providers: Sequence[str], seconds: float, least: int
) -> tuple[Problem, dict[str, Measurement | Exception]]:
    """Measure all but the memory.  Nothing of what the case has built is left behind."""
    problem = build(case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    works, result = first_runs(problem, providers)
    _refuse_without(problem, works, result)

    rounds, failed = interleaved(works, seconds, least, device)
    for name, work in list(works.items()):
        figures = result[name]
        assert isinstance(figures, Measurement)
        if len(rounds[name]) < least:
            result[name] = failed[name]
            del works[name]
            continue
        if name in failed:
            figures.lacks["rounds"] = str(failed[name])
        figures.seconds = rounds[name]
        figures.parts = medians(work.parts()[-len(figures.seconds) :])
        try:
            figures.saved_bytes = saved_bytes(work)
        except Exception as error:
            figures.lacks["saved bytes"] = str(_reason(error))
    _refuse_without(problem, works, result)
    return replace(problem, works={}, exact=None), result


def _refuse_without(problem: Problem, works: Mapping[str, Work], result: Mapping[str, Measurement | Exception]) -> None:
    """Raise where the reference is not among the works: nothing can be compared."""
    if problem.reference not in works:
        reason = result[problem.reference]
        kind = Unavailable if isinstance(reason, Unavailable) else AssertionError
        raise kind(f"the reference cannot run: {reason}")


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.median(each[part] for each in rounds) for part in (rounds[0] if rounds else ())}


def _reason(error: Exception) -> Exception:
    """Make an error fit to be kept: of a program's error the traceback is a note; a GPU's room is free again."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        reason: Exception = Unavailable(f"out of memory: {str(error).splitlines()[0]}")
    else:
        reason = error
        if not isinstance(error, (Unavailable, AssertionError)):
            error.add_note("".join(traceback.format_exception(error)))
    _bare(error)
    release()
    return reason


def _bare(error: Exception) -> Exception:
    """Strip an error of the frames that it came through: they hold models."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------ memory, in its own process


def memory_alone(case: Case, provider: str) -> dict[str, int]:
    """Measure ``memory`` in a fresh process, so that no earlier case's peak or cache is in it."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once; a child shares nothing else
    preload = ["torch", "bench.harness.measure"]
    if not torch.cuda.is_available():  # an import that asks for GPUs would spoil the server for its children
        preload.append("prfl.factory")  # seconds for each child; left out in silence where a package is missing
    context.set_forkserver_preload(preload)

    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_memory, args=(case, provider, theirs))
    child.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        child.join()
        answer = RuntimeError(f"the process that measures {provider}'s memory ended with {child.exitcode}")
    child.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _memory(case: Case, provider: str, result: Any) -> None:
    _give_back_what_is_freed()
    try:
        result.send(memory(case, provider))
    except Exception as error:
        result.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _give_back_what_is_freed() -> None:
    """Have freed tensors leave this process at once, so that a peak is the work's own.

    glibc maps large blocks, but from ever larger sizes on, the more of them a program has freed: what is freed then
    stays in the heap, in holes that the next tensor fits in or not.  A fixed threshold keeps it from that.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 65536)


def memory(case: Case, provider: str) -> dict[str, int]:
    """Measure bytes: ``baseline`` of inputs and weights, ``peak`` of a run above it, and both together.

    The run is not the first, so that an optimizer's averages are there, as in training; they and the gradients are in
    the peak, not in the baseline, which is read after it, when the work has forgotten them.  On a GPU by torch's
    allocator, on Linux without one the process's resident memory.
    """
    work = prepare(build(case), provider)
    outputs(work)  # libraries' workspaces and compiled kernels are there from the first run
    release()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        outputs(work)
        torch.cuda.synchronize()
        total, reserved = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
        work.forget()
        release()
        baseline = torch.cuda.memory_allocated()
        return {"baseline": baseline, "peak": total - baseline, "total": total, "reserved": reserved}

    trim()  # what imports have left in the heap is not the run's
    restart_peak()
    outputs(work)
    total = status("VmHWM")
    work.forget()
    release()
    trim()
    baseline = status("VmRSS")
    return {"baseline": baseline, "peak": total - baseline, "total": total}


def trim() -> None:
    """Give freed memory that glibc keeps back to the system."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def restart_peak() -> None:
    """Start VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def status(name: str) -> int:
    """Return bytes of this process, from /proc/self/status: VmRSS is what it has, VmHWM what it had at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, and the values that a fifth lies below and above."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]
