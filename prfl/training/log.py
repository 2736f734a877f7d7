"""What a run leaves behind while it trains: its folder, metrics.jsonl, trackers, and lines or a bar on the console.

None of them ends a run: what cannot be written is said once, kept where it must not be lost, and tried again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from prfl.utils import processes
from prfl.utils.console import PlainConsole
from prfl.utils.errors import PrflError
from prfl.utils.files import records, replacing, restore_folders

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    config.yaml (resolved), environment.json, metrics.jsonl, trackers/, checkpoints/, samples/, failed/, report.html

    resolved_config: yaml text.  Nothing is written before ``begin``, so a run that is refused leaves no trace, and the
    config of a run that may not be resumed with this one stays as it is.
    """

    path: Path
    resolved_config: str = ""

    def begin(self) -> None:
        """Make the folder, and write the resolved config and the environment into it.

        Call it while the folder is this process's (prfl/utils/lock.py): what a crash left half written is removed.
        """
        halves = [*self.path.rglob(".tmp-*"), *self.path.rglob(".old-*")]
        for folder in {half.parent for half in halves}:
            restore_folders(folder)
        texts = {"environment.json": json.dumps(environment(), indent=2) + "\n"}
        if self.resolved_config:
            texts["config.yaml"] = self.resolved_config
        for name, text in texts.items():
            with replacing(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"


def make_accelerator(
    run: RunFolder, device: str = "auto", trackers: Sequence[str] = ("tensorboard",), timeout: float = 1800.0
) -> Accelerator:
    """accelerate's device placement, process group and trackers; ``device``: auto | cpu | cuda.

    timeout: seconds that a process waits for the others, before it takes them for dead.
    Raises PrflError where processes were started together that accelerate would let run each for itself.
    """
    processes.check_environment()
    project = ProjectConfiguration(project_dir=str(run.path), logging_dir=str(run.path))
    # Left to itself, accelerate makes no process group where torchrun started several processes and there is no GPU.
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # backbone.dtype says what is computed in, and not accelerate's own settings
        log_with=list(trackers) or None,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise PrflError(
            f"{started} processes were started, and accelerate makes {accelerator.num_processes} of them",
            where="WORLD_SIZE",
            fix="start them with torchrun or accelerate launch, with one GPU for each, or backbone.device: cpu",
        )
    return accelerator


def environment() -> dict[str, str | int]:
    """Versions and device: what decides whether a run can be repeated."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    return facts | {"device": device, "threads": torch.get_num_threads()} | {name: version(name) for name in PACKAGES}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, without the lines that a crash has damaged."""
    return records(path)[0]


def drop_metrics_after(path: Path, step: int) -> int:
    """Remove what a run wrote after the checkpoint from which it is now resumed: those steps are run again, and so are
    the evaluations (records without "seconds/step") after that very step.  Damaged lines go too; returns how many."""
    found, damaged = records(path)
    if found or damaged:
        kept = [r for r in found if r["step"] < step or (r["step"] == step and "seconds/step" in r)]
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return damaged


def append(path: Path, text: str) -> None:
    """Add the whole of a text to a file, or, as far as the disk allows, nothing.  Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        before, rest = file.seek(0, os.SEEK_END), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


class Log:
    """Context manager.  Every step goes to metrics.jsonl; trackers and console get means over ``every`` steps.

    On a terminal a rich bar with the latest numbers; elsewhere (a file, CI) plain lines.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        every: int,
        steps: int,
        start: int = 0,
        console: Console | None = None,
    ) -> None:
        self.run, self.accelerator, self.every, self.steps, self.start = run, accelerator, every, steps, start
        self.console = console or PlainConsole()
        self.window: list[Mapping[str, float]] = []
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.began = time.monotonic()
        self.unwritten: list[str] = []  # lines that metrics.jsonl does not have yet
        self.told: set[str] = set()  # what was warned of
        self.tracked_in_vain = 0

    def __enter__(self) -> Log:
        self.previous_hook, threading.excepthook = threading.excepthook, self.on_thread_error
        self.track()
        if self.accelerator.is_main_process and self.console.is_terminal:
            numbers = TextColumn("{task.fields[numbers]}", markup=False)
            columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), numbers]
            self.progress = Progress(*columns, console=self.console)
            self.progress.start()
            self.task = self.progress.add_task("", total=self.steps, completed=self.start, numbers="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        if self.unwritten:
            self.write_lines()
        if self.unwritten:
            self.say(f"warning: {len(self.unwritten)} lines could not be written to {self.run.metrics}")
        for tracker in self.accelerator.trackers:  # not end_training: it also ends the process group, and stages follow
            with suppress(Exception):
                tracker.finish()
        self.accelerator.trackers = []
        threading.excepthook = self.previous_hook

    def on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """No traceback of a tracker's own thread on a full disk: the next number for it meets the same error."""
        if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self.previous_hook(failed)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record finished step number ``step`` (from 1).  Trackers and console get the means since the last time."""
        self.record(step, metrics)
        self.window.append(metrics)
        if self.progress:
            self.progress.update(self.task, completed=step)
        if step % self.every == 0 or step == self.steps:
            means = average(self.window)
            sampled = [int(record["sampled_step"]) for record in self.window if "sampled_step" in record]
            self.window = []
            self.track(means, step)
            self.show(step, means, sampled)

    def event(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what is measured now and then: an evaluation, a distance."""
        self.record(step, metrics)
        self.track(metrics, step)
        self.say(f"step {step}  {line(metrics)}")

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.unwritten.append(json.dumps({"step": step, **metrics}) + "\n")
            self.write_lines()

    def write_lines(self) -> None:
        """What metrics.jsonl does not have yet; where it cannot be written the lines wait for the next time."""
        try:
            append(self.run.metrics, "".join(self.unwritten))
        except OSError as error:
            self.warn(f"{self.run.metrics} cannot be written ({error.strerror}); the run goes on, and its lines wait")
        else:
            self.unwritten.clear()

    def track(self, numbers: Mapping[str, float] | None = None, step: int = 0) -> None:
        """Numbers to the trackers.  One that fails is begun anew later, ever more seldom; metrics.jsonl has it all."""
        if not self.accelerator.trackers and self.tracked_in_vain & (self.tracked_in_vain - 1):
            self.tracked_in_vain += 1
            return
        try:
            if not self.accelerator.trackers:
                self.accelerator.init_trackers("trackers")
            if numbers:
                self.accelerator.log(dict(numbers), step=step)
            self.tracked_in_vain = 0
        except Exception as error:  # whatever a tracker may raise
            self.accelerator.trackers = []
            self.tracked_in_vain += 1
            self.warn(f"the trackers fail ({error}); the run goes on, and {self.run.metrics.name} has every number")

    def warn(self, text: str) -> None:
        """Say it once."""
        if text not in self.told:
            self.told.add(text)
            self.say(f"warning: {text}")

    def show(self, step: int, means: Mapping[str, float], sampled: Sequence[int]) -> None:
        """The numbers without a group, the seconds and the sampled steps; the rest is in metrics.jsonl."""
        text = line({k: v for k, v in means.items() if "/" not in k and k != "sampled_step"})
        if sampled:
            text += f"  sampled_step {','.join(map(str, sampled))}"
        if "seconds/step" in means:
            text += f"  {seconds(means)}"
        if self.progress:
            self.progress.update(self.task, numbers=text)
        else:
            left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  {text}  left {timedelta(seconds=round(left))}")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over the records that have it (a regulariser does not run in every step)."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}


def seconds(means: Mapping[str, float]) -> str:
    """``seconds/step 2.1 (rollout 1.2, reward 0.3, ...)``; a regulariser's steps are among the whole only."""
    parts = {k.removeprefix("seconds/"): v for k, v in means.items() if k.startswith("seconds/")}
    whole = parts.pop("step")
    split = ", ".join(f"{name} {value:.2g}" for name, value in parts.items() if value >= whole / 100)
    return f"seconds/step {whole:.3g}" + (f" ({split})" if split else "")


def line(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
