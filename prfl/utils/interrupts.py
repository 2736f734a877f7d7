"""The signals that end a command.  Imports nothing heavy, as the command line does."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Signals that end a job: Ctrl-C, a cluster's stop, a closed terminal, and a scheduler's warning before the time limit.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
PATIENCE = 5.0  # seconds in which a repeated signal is the same wish: launchers pass on what the terminal sends too


def ending_signals() -> list[signal.Signals]:
    """List the ending signals of this machine that may be handled.

    A signal that is ignored from the start (``nohup``, a shell's ``&``) or handled outside of Python is not listed.
    Outside the main thread the list is empty, because Python lets only the main thread handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    available = [signal.Signals[name] for name in NAMES if hasattr(signal, name)]
    return [number for number in available if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn each ending signal into a KeyboardInterrupt, so that half-written files are cleaned up.

    A signal that is repeated within ``PATIENCE`` is ignored.  Training handles signals itself (training/signals.py).
    """
    last = -math.inf

    def interrupt(*_: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > PATIENCE:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
