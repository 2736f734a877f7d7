"""What test_kill.py runs by itself: ``python tests/training/killed_run.py FOLDER``."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from prfl import cli
from prfl.evaluation import plots
from prfl.runs import stage  # noqa: F401  (commands: imported before the forks, not in each of them)
from prfl.training.checkpoint import list_checkpoints
from prfl.training.run_folder import read_metrics
from tests import pictures
from tests.faults.project import make_project
from tests.tiny import save_tiny_pipeline
from tests.training.signals import not_ignored

STEPS = 16
MOMENTS = random.Random(0)


def main(folder: Path) -> None:
    """A few moments of each kind, both signals, a double start, a closed pipe: what the suite runs."""
    write_project(folder, STEPS)
    ends(start("halves", "training.steps=5"), 0)
    ends(start("halves", stdout=closed_pipe()), 0)
    same("halves")
    for moment in (at_random, in_a_save, at_the_start, in_a_save):
        print("kill -9", *kill_9(moment).values())
    for number in (signal.SIGTERM, signal.SIGINT):
        print(*stop_by(number).values())
    print("double start", *start_twice("killed").values())
    same("killed")
    print("all equal")


def write_project(folder: Path, steps: int) -> None:
    """And its straight run, which the others are compared with."""
    os.chdir(folder)
    make_project(save_tiny_pipeline(folder / "model"))
    config = yaml.safe_load(Path("prfl.yaml").read_text())
    config["data"]["manifest"] = "manifest.jsonl"
    config["objective"]["sft"] = {"every": 2}
    config["backbone"]["adapter"]["dropout"] = 0.1
    config["training"] |= {"ema_decay": 0.9, "keep": 1, "steps": steps}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    ends(start("straight"), 0)


def kill_9(moment: Callable[[int, str], None]) -> dict[str, object]:
    """Go on with runs/killed and end it; what was the last checkpoint before and then, and what was half written."""
    before, child = newest("killed"), start("killed", slow=True)
    moment(child, "killed")
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it was over before the kill"
    half = [path.name for path in Path("runs/killed/checkpoints").glob(".tmp-*")]
    assert half or moment is not in_a_save
    assert Path("runs/killed/run.lock").exists(), "who held the folder is known"
    name = moment.__name__.replace("_", " ")
    return {"moment": name, "from step": before, "last checkpoint": newest("killed"), "half written": len(half)}


def stop_by(number: signal.Signals) -> dict[str, object]:
    """Twice in a moment, as a launcher passes on what the terminal sends too."""
    child = start("killed", slow=True)
    at_random(child, "killed")
    os.kill(child, number)
    time.sleep(0.05)
    os.kill(child, number)
    ends(child, 130)
    last = max(record["step"] for record in read_metrics(Path("runs/killed/metrics.jsonl")))
    assert newest("killed") == last, "a signal saves first"
    return {"signal": number.name, "after step": last, "last checkpoint": newest("killed")}


def start_twice(name: str, *overrides: str) -> dict[str, object]:
    """Two processes go on with one run, until it ends: one of them does, the other is refused and names the first."""
    log = Path(f"{name}.log")
    before = log.read_text() if log.exists() else ""
    children = [start(name, *overrides, slow=True) for _ in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    said = log.read_text().removeprefix(before)
    assert sorted(codes) == [0, 2], f"{codes}\n{said}"
    assert f"process {children[codes.index(0)]} on {socket.gethostname()}" in said, said
    assert "writes into this folder" in said, said
    left = [path.name for path in Path("runs", name).rglob("*") if path.name.startswith((".tmp", ".old", "run.lock"))]
    assert not left, left
    return {"exit codes": sorted(codes), "last checkpoint": newest(name)}


def start(name: str, *overrides: str, slow: bool = False, stdout: int | None = None) -> int:
    """A process that trains runs/NAME.  slow: every flush to the disk takes its time, so that a save can be hit."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log if stdout is None else stdout, 1)
    os.dup2(log, 2)
    if slow:
        flush = os.fsync
        os.fsync = lambda handle: (time.sleep(0.05), flush(handle))[1]
    os._exit(cli.main(["train", "run.yaml", f"run=runs/{name}", *overrides]))


def ends(child: int, code: int) -> None:
    found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    logs = "".join(path.read_text()[-2000:] for path in Path().glob("*.log"))
    assert found == code, f"exit code {found}, not {code}\n{logs}"


def newest(name: str) -> int:
    found = list_checkpoints(Path("runs", name, "checkpoints"))
    return int(found[-1].name.removeprefix("step-")) if found else 0


def until(child: int, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
        time.sleep(0.002)


def at_random(child: int, name: str) -> None:
    """Some time after the first checkpoint of this process."""
    before = newest(name)
    until(child, lambda: newest(name) > before)
    time.sleep(MOMENTS.uniform(0, 0.3))


def at_the_start(child: int, name: str) -> None:
    """Some time after the process has the folder; a lock that the one before it left is no sign of that."""
    lock = Path("runs", name, "run.lock")
    until(child, lambda: lock.exists() and f'"process": {child},' in lock.read_text())
    time.sleep(MOMENTS.uniform(0, 0.5))


def closed_pipe() -> int:
    """What ``| head`` leaves: nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def in_a_save(child: int, name: str) -> None:
    before = newest(name)
    until(child, lambda: newest(name) > before)
    until(child, lambda: any(Path("runs", name, "checkpoints").glob(".tmp-*-step-*/weights.safetensors")))


def same(name: str) -> None:
    """Every byte of the last checkpoint and of the policy, and every number of the log but times and memory."""
    steps = newest("straight")
    last = f"checkpoints/step-{steps:06d}"
    for file in (*(f"{last}/{part}.safetensors" for part in ("weights", "optimizer", "ema")), "policy.safetensors"):
        one, other = (Path("runs", run, file).read_bytes() for run in ("straight", name))
        assert one == other, f"{name}: {file} differs from the straight run's"
    one, other = (
        [
            {k: v for k, v in record.items() if "seconds" not in k and k != "peak_gib"}
            for record in read_metrics(Path("runs", run, "metrics.jsonl"))
        ]
        for run in ("straight", name)
    )
    assert one == other and [record["step"] for record in one] == list(range(1, steps + 1)), f"{name}: metrics differ"
    print(f"{name}: {steps} steps equal the straight run bit for bit")


if __name__ == "__main__":
    plots.png = pictures.blank
    with not_ignored():
        main(Path(sys.argv[1]))
