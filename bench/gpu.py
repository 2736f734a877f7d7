"""Everything that wants a GPU, in pieces of a few minutes; a piece whose result is there is not run again.

    python bench/gpu.py [--budget 540] [--wheels FOLDER] [--only 'wan-1.3b*'] [--list]

First the kernels' tests, compiled, then steps, memory and kernels at Wan's shapes (bench/gpu_pieces.py).  Each piece is
a process with a result file in bench/results/gpu/, which holds a hash of the sources that it was measured of: with
other sources it is run again.
A piece is started only if it should end within the budget (seconds), and is stopped then; what is left is listed.
Where a package is missing, the pieces that need it are left out, and the list says why.  --wheels first installs the
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

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]  # a machine where prfl is not installed will do

from gpu_pieces import Piece, pieces  # noqa: E402

from prfl.benchmark.facts import facts, sources  # noqa: E402

RESULTS = REPOSITORY / "bench/results/gpu"
LEFT_ALONE = ("torch", "triton", "nvidia", "cuda")


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
            if states[piece.name] == "left" and piece.seconds <= end - time.monotonic():
                states[piece.name] = run(piece, options.out, end)
    for name, found in states.items():
        print(f"{name:50} {found}")
    print(f"{sum(each == 'left' for each in states.values())} of {len(states)} left")


def install(folder: Path) -> None:
    wheels = [str(path) for path in sorted(folder.glob("*.whl")) if not path.name.lower().startswith(LEFT_ALONE)]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", *wheels], check=True)


def state(piece: Piece, out: Path) -> str:
    """ "there", "left", or why it cannot run here."""
    for folder in dict.fromkeys((out, RESULTS)):
        file = folder / piece.file
        if file.exists() and json.loads(file.read_text())["piece"]["sources"] == sources(piece.of):
            return "there"
    return next((f"left out: {reason}" for reason in map(obstacle, ("torch", *piece.needs)) if reason), "left")


@cache
def obstacle(module: str) -> str:
    """Why it does not import, in a process of its own; nothing where it does."""
    code = (
        "import torch; assert torch.cuda.is_available(), 'no GPU is here'" if module == "torch" else f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def environment() -> dict[str, str]:
    folders = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "bench")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}


def run(piece: Piece, out: Path, end: float) -> str:
    """Runs it until ``end`` at most and stamps its result; what came of it."""
    target, partial = out / piece.file, out / f".partial-{piece.file}"
    command = [sys.executable, *piece.command, *([f"{piece.result}={partial}"] if piece.result else [])]
    print(f"[{time.strftime('%H:%M:%S')}] {piece.name}", flush=True)
    start = time.monotonic()
    log = out / f"{piece.name}.log"
    with open(log, "w") as console:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=console, stderr=console, start_new_session=True
        )
        try:
            process.wait(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: the processes that it started, too
            process.wait()
            partial.unlink(missing_ok=True)
            return "left"
    last = log.read_text().strip().splitlines()[-1:]
    if not piece.result and process.returncode:
        return f"FAILED, see {log}"
    if piece.result and not (partial.exists() and partial.stat().st_size):
        return f"FAILED, see {log}"
    text = partial.read_text().replace(str(partial), target.name) if piece.result else ""
    result = json.loads(text) if piece.result else facts("random")
    for each in result.get("benchmarks", ()):
        each["stats"].pop("data", None)  # the rounds are in extra_info
    own = {"sources": sources(piece.of), "seconds": round(time.monotonic() - start), "last line": "".join(last)}
    partial.write_text(json.dumps({**result, "piece": {**own, "exit": process.returncode}}, indent=1) + "\n")
    partial.replace(target)
    if not process.returncode:
        log.unlink()
    return "there" if not process.returncode else f"there, but some providers FAILED: see {log}"


if __name__ == "__main__":
    main()
