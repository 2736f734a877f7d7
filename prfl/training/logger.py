"""What a run says while it trains: metrics.jsonl, trackers, and lines or a bar on the console.

None of them ends a run: what cannot be written is reported once, kept where it must not be lost, and tried again.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from rich.progress import Progress, TaskID

from prfl.training.bar import fitting, make_bar
from prfl.training.run_folder import RunFolder
from prfl.training.trackers import Trackers
from prfl.utils.console import PlainConsole
from prfl.utils.console import console as terminal
from prfl.utils.metrics_file import Phase, validation_names


def append(path: Path, text: str) -> None:
    """Append the whole of a text to a file, or, as far as the disk allows, nothing.  Raises OSError."""
    with open(path, "ab", buffering=0) as file:
        before, rest = file.seek(0, os.SEEK_END), text.encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


class Logger:
    """Context manager.  Every step goes to metrics.jsonl; trackers and console get means over ``every`` steps.

    The console gets a line every ``every`` steps, on a terminal as much of it as fits beside a bar (bar.py) with the
    steps and the time that is left; elsewhere (a file, CI) the whole.
    """

    def __init__(
        self,
        run: RunFolder,
        accelerator: Accelerator,
        *,
        every: int,
        steps: int,
        start: int = 0,
        console: PlainConsole = terminal,
    ) -> None:
        self.run, self.accelerator, self.every, self.steps, self.start = run, accelerator, every, steps, start
        self.console = console
        self.window: list[Mapping[str, float]] = []
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.began = time.monotonic()
        self.unwritten: list[str] = []  # lines that metrics.jsonl does not have yet
        names = [str(name) for name in accelerator.log_with] if accelerator.is_main_process else []
        self.trackers = Trackers(names, run, self.warn)

    def __enter__(self) -> Logger:
        self.previous_hook, threading.excepthook = threading.excepthook, self.on_thread_error
        self.trackers.begin()
        if self.accelerator.is_main_process and self.console.is_terminal:
            self.progress = make_bar(self.console)
            self.progress.start()
            self.task = self.progress.add_task("", total=self.steps, completed=self.start, numbers=[])
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()
        if self.unwritten:
            self.write_lines()
        if self.unwritten:
            self.warn(f"{len(self.unwritten)} lines could not be written to {self.run.metrics}")
        self.trackers.finish()
        threading.excepthook = self.previous_hook

    def on_thread_error(self, failed: threading.ExceptHookArgs) -> None:
        """Print no traceback of a tracker's own thread on a full disk: its next number meets the same error."""
        if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self.previous_hook(failed)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record finished step number ``step`` (from 1).  Trackers and console get the means since the last time."""
        self.record(step, "training", metrics)
        self.window.append(metrics)
        if self.progress:
            self.progress.update(self.task, completed=step)
        if step % self.every == 0 or step == self.steps:
            means = average(self.window)
            sampled = [int(record["sampled_step"]) for record in self.window if "sampled_step" in record]
            self.window = []
            self.trackers.log(means, step)
            self.show(step, means, sampled)

    def event(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record what is measured now and then on held-out prompts: its names get ``validation/``."""
        named = validation_names(metrics)
        self.record(step, "validation", named)
        self.trackers.log(named, step)
        self.say("  ".join([f"step {step}", *texts(named)]))

    def record(self, step: int, phase: Phase, metrics: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.unwritten.append(json.dumps({"step": step, "phase": phase, **metrics}) + "\n")
            self.write_lines()

    def write_lines(self) -> None:
        """Write what metrics.jsonl does not have yet; where it cannot be written the lines wait for the next time."""
        try:
            append(self.run.metrics, "".join(self.unwritten))
        except OSError as error:
            self.warn(f"{self.run.metrics} cannot be written ({error.strerror}); the run goes on, and its lines wait")
        else:
            self.unwritten.clear()

    def samples(self, step: int) -> None:
        """Show the trackers the videos that were drawn after a step."""
        if self.accelerator.is_main_process:
            self.trackers.show_samples(step)

    def warn(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.warn(text)

    def show(self, step: int, means: Mapping[str, float], sampled: Sequence[int]) -> None:
        """Print the numbers without a group, the seconds and the sampled steps; the rest is in metrics.jsonl."""
        numbers = texts({k: v for k, v in means.items() if "/" not in k and k != "sampled_step"})
        if sampled:
            numbers.append(f"sampled_step {','.join(map(str, sampled))}")
        if "seconds/step" in means:
            numbers.append(seconds(means))
        count = f"step {step}/{self.steps}"
        if self.progress:
            self.progress.update(self.task, numbers=numbers)
            self.say(fitting([count, *numbers], self.console.width))
        else:
            left = (time.monotonic() - self.began) / (step - self.start) * (self.steps - step)
            self.say("  ".join([count, *numbers, f"left {timedelta(seconds=round(left))}"]))

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.say(text)


def average(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average each number over the records that have it (a regulariser does not run in every step)."""
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            columns.setdefault(name, []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in columns.items()}


def seconds(means: Mapping[str, float]) -> str:
    """Format ``seconds/step 2.1 (rollout 1.2, reward 0.3, ...)``; a regulariser's steps are in the total only."""
    parts = {k.removeprefix("seconds/"): v for k, v in means.items() if k.startswith("seconds/")}
    whole = parts.pop("step")
    split = ", ".join(f"{name} {value:.2g}" for name, value in parts.items() if value >= whole / 100)
    return f"seconds/step {whole:.3g}" + (f" ({split})" if split else "")


def texts(numbers: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in numbers.items()]
