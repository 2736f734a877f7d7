"""Signals as a terminal hands them to a program, whatever the shell or scheduler that started the tests ignores."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from prfl.utils.interrupts import NAMES


@contextmanager
def not_ignored() -> Iterator[None]:
    """``nohup``, and a shell's ``&``, ignore some of the signals that end a run, and children inherit that."""
    known = [signal.Signals[name] for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
