"""The parts of bench/ten_minutes.py; each is run in a process of its own, as

    python bench/ten_minutes_parts.py PART WORLD BUNDLE       and a line with its seconds on standard input

``small`` and ``large`` are Wan's 1.3B and 14B at 480p with 81 frames and random weights, or twice the tiny world.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from bench import ten_minutes_tiles
from bench.ten_minutes import REPOSITORY, append

if TYPE_CHECKING:  # each part imports what it needs: the machine's seconds are counted
    from prfl.config.schema import Config

WORLDS = {"wan": ("wan-1.3b", "wan-14b"), "tiny": ("tiny", "tiny")}
KERNELS = (  # operation, mode: what one wants to know most comes first
    ("attention", "forward"), ("attention", "backward"), ("qk_norm_rope", "forward"), ("qk_norm_rope", "backward"),
    ("gated_residual_norm", "forward"), ("gated_residual_norm", "backward"), ("lora_linear", "forward"),
    ("lora_linear", "both"),
)  # fmt: skip
RANK = {"wan": 64, "tiny": 16}
PLAIN = (  # pytest with nothing but itself
    "-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider", "--confcutdir", "tests/kernels",
)  # fmt: skip
SANITIZED = "tests/kernels/triton/test_operations.py", "-k", "every_launch"
COPIED, SIDE = 2**30, 8192  # bytes of a copy; rows of the square matrices of a product

Emit = Callable[..., None]


class Clock:
    """Seconds that are left of the part's own."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


# --------------------------------------------------------------------------------------------------- device and tests


def device(world: str, emit: Emit, clock: Clock) -> None:
    """Describe the machine, and measure the ceilings that it reaches: a copy and a matrix product."""
    import torch

    from bench.harness.facts import facts

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device_facts: dict[str, Any] = {
        **facts("none"),
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
    }
    if here == "cuda":
        properties = torch.cuda.get_device_properties(0)
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        driver = subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, encoding="utf-8")
        device_facts |= {"gib": properties.total_memory / 2**30, "processors": properties.multi_processor_count}
        device_facts |= {"driver, clocks, power": driver.stdout.strip()}
    emit(row="device", **device_facts)
    bytes_copied, side = (COPIED, SIDE) if here == "cuda" else (2**24, 256)
    dtype = torch.bfloat16 if here == "cuda" else torch.float32
    source = torch.zeros(bytes_copied, dtype=torch.uint8, device=here)
    target = torch.empty_like(source)
    seconds = ten_minutes_tiles.best(lambda: target.copy_(source), here)
    emit(row="copy", gb_per_s=2 * bytes_copied / seconds / 1e9, seconds=seconds)
    left, right = (torch.randn(side, side, device=here, dtype=dtype) for _ in range(2))
    seconds = ten_minutes_tiles.best(lambda: left @ right, here)
    emit(row="product", tflops=2 * side**3 / seconds / 1e12, seconds=seconds, dtype=str(dtype))


def kernel_tests(world: str, emit: Emit, clock: Clock) -> None:
    """Run the Triton kernels' tests, compiled, on several processes where pytest-xdist is there.

    Operations whose files passed as a whole are kept as such on this machine, and ``kernels: auto`` takes them then.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    folder = "tests/kernels/triton" if on_gpu else "tests/kernels/triton/test_qk_norm_rope.py"
    several = ["-n", str(min(12, os.cpu_count() or 1))] if on_gpu and find_spec("xdist") else []
    with TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", folder, *PLAIN, "-rfE", "--maxfail=40", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, *several], cwd=REPOSITORY, capture_output=True, encoding="utf-8", errors="replace"
        )
        outcomes = outcomes_of(report) if report.exists() else {}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = [re.sub(r"\s+", " ", line)[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    emit(row="tests", exit=done.returncode, summary=lines[-1], failed=failed[:40])
    if on_gpu and done.returncode == 0:
        from prfl_kernels.passed import record
        from tests.kernels.triton.conftest import verdicts

        passed = verdicts(outcomes)
        record(passed)
        emit(row="passed", operations=sorted(name for name, is_passed in passed.items() if is_passed))
    if done.returncode not in (0, 5):  # 5: nothing to run, as where Triton runs neither compiled nor interpreted
        raise SystemExit(1)


def outcomes_of(report: Path) -> dict[str, set[str]]:
    """Read {file: outcomes} of a JUnit report."""
    outcomes: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes.setdefault(f"{case.get('classname', '').split('.')[-1]}.py", set()).add(outcome)
    return outcomes


# ------------------------------------------------------------------------------------------------------------ kernels


def kernels(world: str, emit: Emit, clock: Clock) -> None:
    """Compare each operation, forward and backward, with eager torch, torch.compile, SDPA, a copy or a product."""
    from bench.cases.kernel_cases import cases

    for name in dict.fromkeys(WORLDS[world]):
        for operation, mode in KERNELS:
            for case in cases(name):
                settings = case.settings
                wanted = (case.operation, settings["mode"]) == (operation, mode)
                first_shape = settings["tokens"] <= 40000 and settings.get("rank", RANK[world]) == RANK[world]
                if wanted and first_shape and clock.left() > 8:
                    compare(case, emit, seconds=min(1.0, clock.left() / 8))


def compare(case: Any, emit: Emit, seconds: float) -> None:
    """Measure all providers of a case, interleaved; a provider that cannot run gives its reason."""
    from bench.harness.measure import Measurement, timings
    from bench.harness.results import figures

    try:
        problem, result = timings(case, case.providers, seconds, 3)
    except Exception as error:
        emit(row=case.name, failed=f"{type(error).__name__}: {error}")
        return
    reference = result[problem.reference]
    for provider, measured in result.items():
        if isinstance(measured, Measurement) and isinstance(reference, Measurement):
            emit(row=f"{case.name}-{provider}", extra_info=figures(case, provider, problem, measured, reference))
        else:
            emit(row=f"{case.name}-{provider}", failed=f"{type(measured).__name__}: {measured}")


# -------------------------------------------------------------------------------------------------------------- steps


def small_step(world: str, emit: Emit, clock: Clock) -> None:
    """Measure a PRFL step of the small model: latent, latent with kernels, and by a pixel reward on one frame."""
    from bench.cases import step_cases

    name = WORLDS[world][0]
    by_operation = {case.operation: case for case in step_cases.cases(name)}
    in_place(by_operation["step_modes"], step_cases.MODES[:2], emit, clock, rounds=2)
    in_place(by_operation["same_step"], (step_cases.LATENT, "pixel_1"), emit, clock, rounds=2)


def large_step(world: str, emit: Emit, clock: Clock) -> None:
    """Measure a PRFL step of the large model in three modes: the seconds of a forward and of a gradient."""
    from bench.cases import step_cases

    case = next(case for case in step_cases.cases(WORLDS[world][1]) if case.operation == "step_modes")
    in_place(case, step_cases.MODES, emit, clock)


def pixel_all(world: str, emit: Emit, clock: Clock) -> None:
    """Measure the small model's step by a pixel reward on all frames: it needs a card of 141 GB."""
    from bench.cases import step_cases

    case = next(case for case in step_cases.cases(WORLDS[world][0]) if case.operation == "same_step")
    in_place(case, (step_cases.LATENT, "pixel_all"), emit, clock)


def in_place(case: Any, providers: Sequence[str], emit: Emit, clock: Clock, rounds: int = 1) -> None:
    """Run each provider once to warm up, its result checked, then ``rounds`` times, timed, with the allocator's peak.

    In this process, one after another: a process of its own for each peak would take longer than the measurement.
    """
    import torch

    from bench.harness.measure import Expected, Measurement, first_run, medians, release, timed
    from bench.harness.peaks import PEAK, measured_peaks
    from bench.harness.problem import build
    from bench.harness.results import figures

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    release()  # the models of another case before this one
    problem = build(case)
    expectation: Expected | None = None
    reference: Measurement | None = None
    for provider in providers:
        began = time.monotonic()
        try:
            work, measured, expectation = first_run(problem, provider, expectation)
            taken = time.monotonic() - began
            with measured_peaks() if here.type == "cuda" else nullcontext(dict[str, int]()) as peaks:
                for _ in range(rounds):
                    if measured.seconds and clock.left() < taken:
                        break
                    measured.seconds.append(timed(work, here))
        except Exception as error:  # no room, say: the others may have it
            emit(row=f"{case.name}-{provider}", failed=f"{type(error).__name__}: {str(error).splitlines()[0]}")
            release()
            continue
        if here.type == "cuda":
            measured.memory = {"total": peaks[PEAK], "reserved": torch.cuda.memory_reserved()}
        measured.parts = medians(work.parts()[-len(measured.seconds) :])
        reference = reference or measured
        work.forget()
        info = figures(case, provider, problem, measured, reference)
        info |= {"predicted": predicted(case, provider), "measured": peaks}
        emit(row=f"{case.name}-{provider}", extra_info=info)
        release()


def predicted(case: Any, provider: str) -> dict[str, int]:
    """Predict bytes as ``prfl train --dry-run`` does for the same config: at a step's peak and at its phases'."""
    from bench.cases import step_cases
    from bench.harness.peaks import predicted_peaks

    step_modes = case.operation == "step_modes"
    config_of: Callable[..., Config] = step_cases.mode_config if step_modes else step_cases.same_config
    return predicted_peaks(config_of(*case.settings.values(), provider))


# ------------------------------------------------------------------------------------------------- tiles and addresses


def tiles(world: str, emit: Emit, clock: Clock) -> None:
    """Measure the kernels at the small model's shape with other tiles beside the chosen ones."""
    ten_minutes_tiles.tiles(WORLDS[world][0], emit, clock)


def sanitizer(world: str, emit: Emit, clock: Clock) -> None:
    """Run every kernel on few tokens under compute-sanitizer, where the machine has it (command: kernels/README.md).

    It finds what reads or writes beside its tensors, and which threads race for shared memory.
    """
    program = which("compute-sanitizer")
    if program is None:
        emit(row="sanitizer", failed="compute-sanitizer is not on this machine")
        return
    # Without torch's cache every tensor has its own allocation, so that what lies beside one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failures = 0
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *SANITIZED, *PLAIN]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, encoding="utf-8", errors="replace"
        )
        told = [line.strip("= ") for line in done.stdout.splitlines() if re.search(r"SUMMARY|\d (passed|failed)", line)]
        emit(row=f"sanitizer-{tool}", exit=done.returncode, summary="; ".join(told) or done.stderr[-300:])
        failures += done.returncode != 0
    if failures:
        raise SystemExit(1)


PARTS: dict[str, Callable[[str, Emit, Clock], None]] = {
    "device": device, "kernel-tests": kernel_tests, "kernels": kernels, "small-step": small_step,
    "large-step": large_step, "pixel-all": pixel_all, "tiles": tiles, "sanitizer": sanitizer,
}  # fmt: skip
IMPORTS = {
    "kernels": ("bench.cases.kernel_cases",), "kernel-tests": (), "sanitizer": (),
    "device": ("bench.harness.facts",),
}  # fmt: skip
STEPS = ("bench.cases.step_cases", "bench.harness.measure")


def begin(imports: Iterable[str]) -> float:
    """Import ahead, then wait for the line that says how many seconds there are.  No line: this part is not wanted."""
    from importlib import import_module

    for module in imports:
        import_module(module)
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    return float(line)


def main() -> None:
    name, world, bundle = sys.argv[1:4]
    clock = Clock(begin(IMPORTS.get(name, STEPS)))
    began = time.monotonic()

    def emit(**row: Any) -> None:
        line = {"part": name, "at": round(time.monotonic() - began, 2), **row}
        append(Path(bundle), line)
        shown = line.get("extra_info", line)
        told = shown.get("milliseconds", {}).get("median") if "milliseconds" in shown else line.get("failed", "")
        print(f"  {row['row']}: {told}", flush=True)

    PARTS[name](world, emit, clock)


if __name__ == "__main__":
    main()
