"""Run folders: two processes in one, what a crash leaves, outputs that cannot be written."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from prfl.utils import files
from prfl.utils.lock import NAME, Holder
from tests.faults.planting import fault, warning

RUN = Path("runs/sft")
WHO = f"process 77 on {socket.gethostname()} (prfl train sft.yaml; since 2026-01-01 00:00:00 UTC)"
HELD = (f"runs/sft: {WHO} writes into this folder", "wait until it ends, stop it, or use another folder (run=FOLDER)")


def write_lock(host: str = "") -> Path:
    since = "2026-01-01 00:00:00 UTC"
    holder = Holder(host or socket.gethostname(), 77, 1.0, since, "prfl train sft.yaml", "token")
    RUN.mkdir(parents=True, exist_ok=True)
    (RUN / NAME).write_text(json.dumps(asdict(holder)))
    return RUN / NAME


@contextmanager
def held():
    """By an open file of its own, as another process has."""
    fcntl = pytest.importorskip("fcntl")
    with write_lock().open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    (RUN / NAME).unlink()


@fault("two processes train in one folder", *HELD)
def _(bench):
    with held():
        return bench.cli("train", "sft.yaml", "training.steps=3")


@fault("a policy is measured while its run trains", *HELD)
def _(bench):
    with held():
        return bench.cli("eval", "--run", "runs/sft")


@fault("videos are drawn while their run trains", *HELD)
def _(bench):
    with held():
        return bench.cli("sample", "sft.yaml")


@fault("videos are drawn for labels while their run trains", *HELD)
def _(bench):
    with held():
        return bench.cli("sample", "sft.yaml", "--per-prompt", "2")


@fault("a run is exported into its folder while it trains", *HELD)
def _(bench):
    with held():
        return bench.cli("export", "runs/sft")


@fault(
    "a folder without locks that another machine's process has",
    "runs/sft: process 77 on elsewhere",
    "if that process has ended, delete",
)
def _(bench):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    bench.patch.setattr("prfl.utils.lock.fcntl.flock", no_locks)
    path = write_lock("elsewhere")
    message = bench.cli("train", "sft.yaml", "training.steps=3")
    path.unlink()
    return message


@fault("a full disk under the standard output", "the standard output cannot be written: No space left on device")
def _(bench):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

        def fileno(self):
            raise OSError

    with bench.patch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        return bench.cli("schema")


@warning("a lock that a dead process left", f"runs/sft/{NAME} was left by {WHO}, which has ended: taken over")
def _(bench):
    write_lock()
    return bench.warned("train", "sft.yaml")


@warning("NUL bytes and half a line in metrics.jsonl", "runs/sft/metrics.jsonl: 2 damaged lines", "are left out")
def _(bench):
    with (RUN / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 100 + b'\n{"step": 3, "lo')
    return bench.warned("train", "sft.yaml")


@warning("an empty results.json", "runs/sft/samples/step-000001/results.json is damaged", "is left out")
def _(bench):
    (RUN / "samples" / "step-000001").mkdir(parents=True)
    (RUN / "samples" / "step-000001" / "results.json").touch()
    return bench.warned("train", "sft.yaml", "evaluation.every=2", "training.steps=4")


@warning(
    "an old checkpoint that is busy", "step-000001, which is no longer needed, cannot be removed: Device or resource"
)
def _(bench):
    rmtree = files.shutil.rmtree

    def busy(path, **more):
        if "step-000001" in str(path) and not more:
            raise OSError(16, os.strerror(16))
        rmtree(path, **more)

    bench.patch.setattr(files.shutil, "rmtree", busy)
    return bench.warned("train", "sft.yaml", "training.steps=3", "training.keep=1")
