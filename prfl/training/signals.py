"""Ctrl-C and SIGTERM as a wish that the loop grants between two steps, or in the middle of an evaluation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator


class Stopped(BaseException):
    """Raised by a signal inside ``StopSignals.at_once``, and caught there."""


class StopSignals:
    """Context manager.  ``.received`` is the name of the first SIGINT or SIGTERM; a second one acts as usual.

    Python lets only the main thread handle signals; in another thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.interrupts = self.left_early = False
        self.previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self.restore()
        if self.interrupts:
            raise Stopped

    @contextmanager
    def at_once(self, accelerator: Accelerator) -> Iterator[None]:
        """Around what may take minutes and changes nothing of the run's state: a signal leaves it in the middle.

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
        """The signal, or a word for another process's: all processes must leave the loop after the same step."""
        if accelerator.num_processes == 1:
            return self.received
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return (self.received or "a signal to another process") if accelerator.reduce(flag, "sum") > 0 else None

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.previous = {}

    def __exit__(self, *_: object) -> None:
        self.restore()
