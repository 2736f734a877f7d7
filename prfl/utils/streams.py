"""Keep a run going when its standard output or standard error can no longer be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


class LossyStream:
    """A standard stream whose reader may go away (``| head``, a closed terminal), or whose disk may be full: what it
    cannot write is lost, with one warning on the standard error."""

    def __init__(self, stream: Any, name: str) -> None:
        self.stream, self.name = stream, name
        self.broken = self.told = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with self._lossy():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lossy():
            self.stream.flush()

    @contextmanager
    def _lossy(self) -> Iterator[None]:
        try:
            yield
        except UnicodeError:  # a ValueError, too
            raise
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.broken = True
            if not self.told and sys.stderr is not self:
                self.told = True
                reason = getattr(error, "strerror", None) or error
                print(f"warning: {self.name} cannot be written ({reason}); the work goes on", file=sys.stderr)
        else:
            self.broken = False

    def end(self) -> None:
        """Flush; what could not be written must not end the interpreter with an error either."""
        self.flush()
        if self.broken:
            silence(self.stream)


def silence(stream: Any) -> None:
    """Discard what is still in the stream's buffer, so that the interpreter's last flush does not fail."""
    with suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def lossy_output() -> Iterator[None]:
    """Let the code inside go on when the standard output or error fails.  May be nested."""
    if isinstance(sys.stdout, LossyStream) or sys.stdout is None or sys.stderr is None:
        yield
        return
    out, error = LossyStream(sys.stdout, "the standard output"), LossyStream(sys.stderr, "the standard error")
    with redirect_stdout(out), redirect_stderr(error):  # type: ignore[type-var]
        try:
            yield
        finally:
            out.end()
            error.end()
