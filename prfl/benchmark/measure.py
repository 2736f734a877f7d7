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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prfl.benchmark.agreement import relative_errors, too_far
from prfl.benchmark.problem import Case, Outputs, Problem, Unavailable, Work, build, prepare
from prfl.forecast.live_bytes import SavedBytes

WARMUPS = 3  # a provider's first runs compile, tune and fill caches; they are not timed
LONG = 3.0  # seconds of a run that one warm-up is enough for: the runs that compare are runs, too
ROUNDS = 200  # at most: more make large files and no narrower interval
FLUSHED = 256 * 2**20  # bytes written between two runs on a GPU, so that nothing is found in its cache
APART = 3.0  # providers may be so many times as far from float64 as the reference is, and still compute the same thing


@dataclass
class Found:
    """What was measured of one provider."""

    seconds: list[float] = field(default_factory=list)  # of every round; a GPU's own clock where there is one
    saved_bytes: int | None = None  # for the backward pass, without weights; distinct storages
    errors: dict[str, float] = field(default_factory=dict)  # relative, of every output
    against: str = ""  # what the errors are relative to: float64, or the reference
    memory: dict[str, int] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)  # seconds, of the median round's parts each
    facts: dict[str, float] = field(default_factory=dict)


def interleaved(works: Mapping[str, Work], seconds: float, least: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every round of every provider, in rounds that all of them take part in.

    seconds: for each provider, about; least: rounds, however long they take.
    """
    longest = max(warmed(work, device) for work in works.values())
    rounds = max(least, min(ROUNDS, int(seconds / max(longest, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in works}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, work in works.items():
                found[name].append(timed(work, device))
    finally:
        if enabled:
            gc.enable()
    return found


def warmed(work: Work, device: torch.device) -> float:
    """Seconds of a whole run, warmed up."""
    first = timed(work, device) * work.repeats
    return first if first > LONG else min(timed(work, device) for _ in range(WARMUPS - 1)) * work.repeats


def timed(work: Work, device: torch.device) -> float:
    """Seconds of one run, over its ``repeats``.

    On a GPU by its events, behind a write that empties its cache and hides launches.
    """
    given = work.before()
    if device.type != "cuda":
        start = time.perf_counter()
        result = work.run(given)
        taken = time.perf_counter() - start
        del result, given
        return taken / work.repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.empty(FLUSHED, dtype=torch.int8, device=device).zero_()
    begin.record()
    result = work.run(given)
    end.record()
    torch.cuda.synchronize()
    del result, given
    return begin.elapsed_time(end) / 1000 / work.repeats


def outputs(work: Work) -> Outputs | None:
    return work.run(work.before())


def saved_bytes(work: Work) -> int:
    """Most that autograd keeps during one run, ``work.constant`` not counted."""
    with SavedBytes(work.constant) as saved:
        outputs(work)
    return saved.peak


def compare(problem: Problem, works: Mapping[str, Work], found: Mapping[str, Found]) -> dict[str, str]:
    """Fills in the errors; what is wrong with each provider that did not compute the same as the reference.

    Nothing is compared where the reference has no outputs: its providers are different things, each checked alone.
    """
    torchs = outputs(works[problem.reference])
    if torchs is None:
        return {}
    exact = problem.exact() if problem.exact else {name: value.double() for name, value in torchs.items()}
    exact = {name: exact[name] for name in torchs}
    wrong = {}
    for name, work in works.items():
        own = torchs if name == problem.reference else outputs(work)
        if own is None:
            continue
        if own.keys() != torchs.keys():
            wrong[name] = f"computed {', '.join(own)}; the reference {', '.join(torchs)}"
            continue
        if problem.exact:
            lines = too_far(own, torchs, exact, factor=APART)
            found[name].against = problem.exact_is
        else:
            errors = relative_errors(own, exact)
            lines = [f"{key}: {error:.3g}" for key, error in errors.items() if not error <= problem.tolerance]
            found[name].against = problem.reference
        found[name].errors = relative_errors(own, exact)
        if lines:
            wrong[name] = f"{name} did not compute what {problem.reference} did: {'; '.join(lines)}"
    return wrong


def measure(
    case: Case, providers: Sequence[str], seconds: float, least: int
) -> tuple[Problem, dict[str, Found | Exception]]:
    """Every provider's figures, or why it has none: Unavailable, AssertionError (it computed something else), others.

    The reference takes part whether it is asked for or not.  Raises Unavailable where the case itself cannot run.
    """
    problem = build(case)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    works: dict[str, Work] = {}
    result: dict[str, Found | Exception] = {}
    for name in dict.fromkeys([problem.reference, *providers]):
        try:
            works[name] = prepare(problem, name)
            outputs(works[name])
            if wrong := works[name].check():
                raise AssertionError(f"{name}: {wrong}")
            result[name] = Found(facts=dict(works[name].facts))
        except Exception as error:  # one that cannot run takes no other with it
            works.pop(name, None)
            result[name] = _reason(error)
    if problem.reference not in works:
        raise Unavailable(f"the reference cannot run: {result[problem.reference]}")
    good = {name: found for name, found in result.items() if isinstance(found, Found)}
    for name, wrong in compare(problem, works, good).items():
        result[name] = AssertionError(wrong)
        del works[name], good[name]
    for name, taken in interleaved(works, seconds, least, device).items():
        good[name].seconds = taken
        good[name].parts = medians(works[name].parts()[-len(taken) :])
        good[name].saved_bytes = saved_bytes(works[name])
    works.clear()
    release()
    if case.memory:
        for name, found in good.items():
            found.memory = memory_alone(case, name)
    return problem, result


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {part: statistics.median(each[part] for each in rounds) for part in (rounds[0] if rounds else ())}


def _reason(error: Exception) -> Exception:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return Unavailable(f"out of memory: {str(error).splitlines()[0]}")
    return error


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------ memory, in its own process


def memory_alone(case: Case, provider: str) -> dict[str, int]:
    """``memory`` in a fresh process, so that no earlier case's peak or cache is in it."""
    context = multiprocessing.get_context("forkserver")  # it imports torch once; a child shares nothing else
    preload = ["torch", "prfl.benchmark.measure"]
    if not torch.cuda.is_available():  # an import that asks for GPUs would spoil the server for its children
        preload.append("prfl.build")  # seconds for each child; left out in silence where a package is missing
    context.set_forkserver_preload(preload)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_memory, args=(case, provider, theirs))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        child.join()
        found = RuntimeError(f"the process that measures {provider}'s memory ended with {child.exitcode}")
    child.join()
    if isinstance(found, Exception):
        raise found
    return found


def _memory(case: Case, provider: str, result: Any) -> None:
    try:
        result.send(memory(case, provider))
    except Exception as error:
        result.send(RuntimeError(f"{type(error).__name__}: {error}"))


def memory(case: Case, provider: str) -> dict[str, int]:
    """Bytes: ``baseline`` when the inputs and weights are there, ``peak`` of a run above it, and both together.

    On a GPU by torch's allocator, on Linux without one the process's resident memory.
    """
    work = prepare(build(case), provider)
    if torch.cuda.is_available():
        outputs(work)  # libraries' workspaces and compiled kernels are there from the first run
        release()
        baseline = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs(work)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return {"baseline": baseline, "peak": peak - baseline, "total": peak, "reserved": torch.cuda.memory_reserved()}
    outputs(work)
    release()
    with suppress(OSError, AttributeError):  # another C library than glibc: what was freed may be counted as there
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    restart_peak()
    baseline = status("VmRSS")
    outputs(work)
    total = status("VmHWM")
    return {"baseline": baseline, "peak": total - baseline, "total": total}


def restart_peak() -> None:
    """From here on VmHWM starts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def status(name: str) -> int:
    """Bytes of this process, from /proc/self/status: VmRSS is what it has, VmHWM what it had at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, and the values that a fifth lies below and above."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), fifths[0], fifths[-1]
