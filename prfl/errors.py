"""The one exception for a mistake that the user can mend: what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prfl.text import visible


class PrflError(ValueError):
    """Shown by the command line without a traceback.

    what: the fault in one sentence.  where: a yaml path (``configs/x.yaml: rollout.steps``) or ``file:line``.
    fix: what to do about it; empty only where ``what`` says it.
    """

    def __init__(self, what: str, *, where: str = "", fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [f"{where}: {what}" if where else what]
        if fix:
            parts.append(f"To mend it: {fix}")
        super().__init__("\n  ".join(map(visible, parts)))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Gives a PrflError from inside a place, where it has none: the code that raises it does not know the yaml path."""
    try:
        yield
    except PrflError as error:
        if error.where:
            raise
        raise PrflError(error.what, where=where, fix=error.fix) from error
