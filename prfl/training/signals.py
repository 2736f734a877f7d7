"""The signals that end a run, as a wish that the loop grants between two steps, or in the middle of an evaluation."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
from accelerate import Accelerator

from prfl.utils import processes
from prfl.utils.interrupts import PATIENCE, ending_signals


class Stopped(BaseException):
    """Raised by a signal inside ``StopSignals.at_once``, and caught there."""


class StopSignals:
    """Context manager.  ``.received`` is the name of the first signal, after which the loop ends.

    A repeated one is ignored within PATIENCE and during a save (``undisturbed``); later it is a KeyboardInterrupt.
    Python lets only the main thread handle signals; in another thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.interrupts = self.left_early = False
        self.patient_until = 0.0
        self.saving = False
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in ending_signals():
            self.previous[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received, self.patient_until = name, time.monotonic() + PATIENCE
            if self.interrupts:
                raise Stopped
            tell(f"{name}: the run saves after this step and ends; a second one, after {PATIENCE:.0f} s, breaks it off")
        elif not self.saving and time.monotonic() > self.patient_until:
            self.saving = True  # on the way out; nothing ends it any more but kill -9
            raise KeyboardInterrupt

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Let no signal break off what runs inside: a save."""
        before, self.saving = self.saving, True
        try:
            yield
        finally:
            self.saving = before

    @contextmanager
    def at_once(self, accelerator: Accelerator) -> Iterator[None]:
        """Let a signal break off what runs inside: it may take minutes, and changes nothing of the run's state.

        Several processes would lose step with each other, so there the signal waits until it is over.
        """
        try:
            self.interrupts = accelerator.num_processes == 1
            yield
        except Stopped:
            self.left_early = True
        finally:
            self.interrupts = False

    def anywhere(self, accelerator: Accelerator) -> str | None:
        """Return the signal, or words for another process's: all processes must leave the loop after the same step."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return (self.received or "a signal to another process") if accelerator.reduce(flag, "sum") > 0 else None

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous = {}


def tell(text: str) -> None:
    """Write to the standard error, past its buffer: a signal may come while that is being written."""
    if processes.is_main():
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())
