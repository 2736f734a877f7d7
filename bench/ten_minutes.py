"""What ten minutes on a GPU can tell, in one command: the most telling part first, nothing lost when time runs out.

    python bench/ten_minutes.py [--out FOLDER] [--budget 560] [--world wan|tiny] [--only PART]

Each part (bench/ten_minutes_parts.py) is a process with a deadline of its own.  It appends a JSON line to
FOLDER/ten_minutes.jsonl after each figure, forced to the disk at once, and its process is started, with its imports,
while the part before it still measures.  A part that has ended with the same sources on the same device is not run
again, so the same command goes on where the last one stopped.  ``python -m bench report
FOLDER/ten_minutes.jsonl`` shows it.

Nothing is fetched and git is not asked: PRFL_COMMIT names the commit.  torch, triton, transformers, peft, accelerate,
pytest and rich must be there; diffusers, pydantic, pydantic-core, annotated-types and typing-inspection as wheels will
do.  On a machine without a package index:

    python -m pip install -q --no-index --no-deps --no-compile --target SITE WHEELS/*.whl
    PYTHONPATH=SITE PRFL_COMMIT=... python bench/ten_minutes.py --out FOLDER

``--world tiny`` rehearses the same parts with the model inside the package, on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLE = "ten_minutes.jsonl"
RESERVE = 4.0  # seconds that the last lines and the way out take
# Name, seconds without which it is not worth starting, seconds after which it is stopped: in the order of their worth.
PARTS = (
    ("device", 5, 40),
    ("kernel-tests", 20, 75),
    ("kernels", 30, 120),
    ("small-step", 40, 130),
    ("large-step", 60, 170),
    ("pixel-all", 60, 110),
    ("tiles", 15, 75),
    ("sanitizer", 15, 60),
)


class Child:
    """A part's process.  It imports what it needs and then waits for a line on its standard input."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).with_name("ten_minutes_parts.py")), name, options.world]
        self.process = subprocess.Popen(
            [*command, str(options.out / BUNDLE)], cwd=REPOSITORY, env=environment(), stdin=subprocess.PIPE,
            encoding="utf-8", start_new_session=True,
        )  # fmt: skip

    def run(self, seconds: float) -> str:
        """Let it begin, and wait; what became of it: "done", or why not."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it ended while it was importing
            pass
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return f"stopped after {seconds:.0f} s"
        return "done" if code == 0 else f"failed with exit code {code}"

    def stop(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment() -> dict[str, str]:
    ours = (str(REPOSITORY / folder) for folder in ("", "kernels", "bench"))
    path = os.pathsep.join(filter(None, (*ours, os.environ.get("PYTHONPATH", ""))))
    fixed = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": path}


def append(bundle: Path, line: dict[str, Any]) -> None:
    """Append a JSON line, which is on the disk before this returns."""
    with bundle.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def ended(bundle: Path, key: list[str]) -> set[str]:
    """Return the parts that were done with these sources on this device in this world."""
    lines = bundle.read_text(encoding="utf-8").splitlines() if bundle.exists() else []
    done = set()
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # half a line, of a machine that was taken away
            continue
        if line.get("end") == "done" and line.get("key") == key:
            done.add(line["part"])
    return done


def identity(world: str) -> list[str]:
    """Return what a result belongs to: a hash of the sources, the device, the world.

    It is found out in a process of its own: this one must not hold a GPU.
    """
    code = "from bench.harness.facts import device_name, sources; print(sources()); print(device_name() or 'cpu')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), cwd=REPOSITORY)
    if done.returncode:
        raise SystemExit(f"prfl cannot be imported here: {done.stderr.strip().splitlines()[-1]}")
    return [*done.stdout.splitlines(), world]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results/gpu", help="default: bench/results/gpu")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of it; default: 560")
    parser.add_argument("--world", choices=("wan", "tiny"), default="wan", help="tiny rehearses; default: wan")
    parser.add_argument("--only", action="append", choices=[name for name, *_ in PARTS], help="this part; repeatable")
    options = parser.parse_args()

    end = time.monotonic() + options.budget - RESERVE
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    bundle = options.out / BUNDLE

    key = identity(options.world)
    done = ended(bundle, key)
    wanted = [part for part in PARTS if part[0] not in done and part[0] in (options.only or [part[0]])]
    for name in [name for name, *_ in PARTS if name in done]:
        print(f"{name}: is there already", flush=True)
    failures = run(wanted, options, bundle, key, end)
    print(f"{len(wanted) - failures} of {len(wanted)} parts done; {bundle}", flush=True)
    return 1 if failures else 0


def run(
    wanted: list[tuple[str, int, int]], options: argparse.Namespace, bundle: Path, key: list[str], end: float
) -> int:
    """Run each part in turn; returns how many are not done."""
    failures = 0
    following: Child | None = None
    for number, (name, least, most) in enumerate(wanted):
        child, following = following or Child(name, options), None
        left = end - time.monotonic()
        began = time.monotonic()
        if left < least:
            child.stop()
            outcome = f"left out: {left:.0f} s are left, and it wants {least}"
        else:
            if number + 1 < len(wanted):  # its imports run beside this part's measurements, on other cores
                following = Child(wanted[number + 1][0], options)
            outcome = child.run(min(most, left))
        seconds = round(time.monotonic() - began, 1)
        append(bundle, {"part": name, "end": outcome, "seconds": seconds, "key": key})
        print(f"{name}: {outcome}, {seconds} s", flush=True)
        failures += outcome != "done"
    return failures


if __name__ == "__main__":
    sys.exit(main())
