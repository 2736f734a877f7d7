"""Everything that wants a GPU, in pieces of a few minutes; a piece whose result is there is not run again.

    python bench/gpu.py [--budget 540] [--wheels FOLDER] [--only 'wan-1.3b*'] [--list]

First the kernels' tests, compiled, then steps, memory and kernels at Wan's shapes (bench/gpu_pieces.py).  Each piece is
a process with a result file in bench/results/gpu/, which holds a hash of the sources that it was measured of: with
other sources it is run again.
A piece is started only if it should end within the budget (seconds), and is stopped then; what is left is listed.
Where a package is missing, or the GPU has too little memory, the pieces that need it are left out, with the reason.
What failed, or skipped all that it has, leaves a stamp and is not tried again on the same device with the same sources;
what did not end in time is not started with less than half as much again.  --wheels first installs the
wheels of a folder, with no index and no dependencies; those of torch and triton in it are left alone.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]  # a machine where prfl is not installed will do

from bench.gpu_pieces import Piece, pieces  # noqa: E402
from bench.harness.facts import facts, sources  # noqa: E402

RESULTS = REPOSITORY / "bench/results/gpu"
LEFT_ALONE = ("torch", "torchvision", "torchaudio", "triton", "pytorch_triton")  # packages; and of these families
FAMILIES = ("nvidia", "cuda")
NO_ROOM = ("out of memory", "needs a GPU with")  # what a skipped provider says that another card may have room for
LARGER = 1.05  # a card with so much more memory is tried with what another had no room for
AGAIN = 1.5  # of the seconds that were too few


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds for all that is started now; default: 540")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these first, without an index")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="pieces whose name matches, such as 'tests-*'")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where new results go; default: bench/results/gpu")
    parser.add_argument("--list", action="store_true", help="say what is there and what is left, and run nothing")
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    if options.wheels:
        install(options.wheels)

    chosen = [piece for piece in pieces() if fnmatch.fnmatch(piece.name, options.only)]
    states = {piece.name: state(piece, options.out) for piece in chosen}
    if not options.list:
        options.out.mkdir(parents=True, exist_ok=True)
        for piece in chosen:
            if states[piece.name] == "left" and lasting(piece, options.out) <= end - time.monotonic():
                states[piece.name] = run(piece, options.out, end)

    for piece in chosen:
        late = f", and wants {lasting(piece, options.out):.0f} s" if lasting(piece, options.out) > piece.seconds else ""
        print(f"{piece.name:50} {states[piece.name]}{late}")
    print(f"{sum(each == 'left' for each in states.values())} of {len(states)} left")


def install(folder: Path) -> None:
    wheels = [str(path) for path in sorted(folder.glob("*.whl")) if not left_alone(path.name)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)


def left_alone(wheel: str) -> bool:
    """Return whether a wheel is of what torch is built with; torchmetrics, say, is not."""
    package = wheel.lower().split("-")[0]
    return package in LEFT_ALONE or package.split("_")[0] in FAMILIES


def state(piece: Piece, out: Path) -> str:
    """Return "there", "left", or why a piece cannot run here."""
    here = device()
    result = stamp(piece, out, piece.file)
    if result and not (result.get("no room") and here.gib > LARGER * result["gib"]):
        return "there"
    for reason in map(obstacle, ("torch", *piece.needs)):
        if reason:
            return f"left out: {reason}"
    if piece.gib > here.gib:
        return f"left out: needs {piece.gib:.0f} GiB, and this GPU has {here.gib:.0f}"
    failed = stamp(piece, out, piece.failure)
    if failed and failed["device"] == here.name and not failed["late"]:
        return f"FAILED on this device: {failed['reason']}"
    return "left"


def stamp(piece: Piece, out: Path, name: str) -> dict | None:
    """Read what a file says of a piece with the sources as they are now; None where there is no such file."""
    for folder in dict.fromkeys((out, RESULTS)):
        if (file := folder / name).exists():
            stamped = json.loads(file.read_text(encoding="utf-8"))["piece"]
            if stamped["sources"] == sources(piece.of):
                return stamped
    return None


def lasting(piece: Piece, out: Path) -> float:
    """Return the seconds to plan with: more than what the piece was stopped after on this device."""
    failed = stamp(piece, out, piece.failure)
    late = failed["late"] if failed and failed["device"] == device().name else 0.0
    return max(piece.seconds, AGAIN * late)


class Device(NamedTuple):
    name: str
    gib: float


@cache
def device() -> Device:
    """Ask for the GPU that is here, in a process of its own; no name and no memory without one."""
    code = (
        "import json, torch; own = torch.cuda.get_device_properties(0); "
        "print(json.dumps([own.name, own.total_memory / 2**30]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment())
    return Device(*json.loads(done.stdout)) if done.returncode == 0 else Device("", 0.0)


@cache
def obstacle(module: str) -> str:
    """Say why a module cannot be imported, in a process of its own; nothing where it can."""
    code = (
        "import torch; assert torch.cuda.is_available(), 'no GPU is here'" if module == "torch" else f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment())
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def environment() -> dict[str, str]:
    folders = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "bench")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def run(piece: Piece, out: Path, end: float) -> str:
    """Run a piece until ``end`` at most and stamp its result, or why there is none; returns its state."""
    target, partial = out / piece.file, out / f".partial-{piece.file}"
    command = [sys.executable, *piece.command, *([f"{piece.result}={partial}"] if piece.result else [])]
    print(f"[{time.strftime('%H:%M:%S')}] {piece.name}", flush=True)

    # In a session of its own, so that a piece that takes too long ends with all its processes.
    start = time.monotonic()
    log = out / f"{piece.name}.log"
    with open(log, "w", encoding="utf-8") as console:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=console, stderr=console, start_new_session=True
        )
        try:
            process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the processes that it started, too
            process.wait()
            partial.unlink(missing_ok=True)
            failure(piece, out, "it did not end in time", late=time.monotonic() - start)
            return "left"

    # What it wrote, and what it said.
    lines = log.read_text(encoding="utf-8").strip().splitlines() or [""]
    skipped = [line for line in lines if line.startswith("SKIPPED")]
    written = partial.exists() and partial.stat().st_size > 0
    text = partial.read_text(encoding="utf-8").replace(str(partial), target.name) if written else ""
    result = json.loads(text) if text else {} if piece.result else facts("random")

    empty = not text or result.get("benchmarks") == []  # that of a script has no such list
    if (piece.result and empty) or (not piece.result and process.returncode):
        partial.unlink(missing_ok=True)
        reason = (skipped or lines[-1:])[0]
        failure(piece, out, reason)
        return f"FAILED, see {log}: {reason}"

    # The result, with the facts of this piece.
    for each in result.get("benchmarks", ()):
        each["stats"].pop("data", None)  # the rounds are in extra_info
    piece_facts = {
        "sources": sources(piece.of), "seconds": round(time.monotonic() - start), "last line": lines[-1],
        "exit": process.returncode, "gib": device().gib,
        "no room": any(words in line for line in skipped for words in NO_ROOM),
    }  # fmt: skip
    partial.write_text(json.dumps({**result, "piece": piece_facts}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)
    (out / piece.failure).unlink(missing_ok=True)
    if not process.returncode:
        log.unlink()
    return "there" if not process.returncode else f"there, but some providers FAILED: see {log}"


def failure(piece: Piece, out: Path, reason: str, late: float = 0.0) -> None:
    """Write the stamp of a piece that gave no result.  late: seconds that were too few."""
    piece_facts = {"sources": sources(piece.of), "device": device().name, "reason": reason, "late": round(late, 1)}
    (out / piece.failure).write_text(json.dumps({"piece": piece_facts}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
