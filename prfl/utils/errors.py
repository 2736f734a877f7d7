"""The one exception for a mistake that the user can mend: what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prfl.utils.text import visible

SHOWN = 20  # of the faults of a file: these show what the others are


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

    @property
    def one_line(self) -> str:
        """What is wrong and how to mend it, for a list of several: the place stands in front there."""
        return f"{self.what} ({self.fix})" if self.fix else self.what


class AbsentError(PrflError):
    """A file or folder is not there.  path: as it was named."""

    def __init__(self, what: str, *, path: Path, fix: str, where: str = "") -> None:
        self.path = path
        super().__init__(what, where=where or str(path), fix=fix)


class GuardError(PrflError):
    """A run must not go on from here, so nothing is saved on the way out."""


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add ``where`` to a PrflError from inside that has none: the code that raises it does not know the yaml path."""
    try:
        yield
    except PrflError as error:
        if error.where:
            raise
        raise type(error)(error.what, where=where, fix=error.fix) from error


class Faults:
    """Gathers what is wrong with the rows of a file, or other inputs, so that one error can name all of it."""

    def __init__(self) -> None:
        self.errors: list[PrflError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep a PrflError from inside, and go on behind the block."""
        try:
            yield
        except PrflError as error:
            self.errors.append(error)

    def raise_all(self, where: str | Path, kind: str = "rows") -> None:
        """Raise the only fault as it is, and several as one error that lists them with the remedy of each."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            # A row may have several faults; an error that names the whole file, or key, is of a row of its own.
            rows = [str(error.where) for error in self.errors]
            count = len({row for row in rows if row != str(where)}) + rows.count(str(where))
            alone = f"one of the {kind} is wrong in {len(rows)} ways"
            lines = [f"{count} {kind} are wrong" if count > 1 else alone]
            lines += [f"  {error.where}: {error.one_line}" for error in self.errors[:SHOWN]]
            if len(self.errors) > SHOWN:
                lines.append(f"  and {len(self.errors) - SHOWN} more")
            raise PrflError("\n".join(lines), where=str(where), fix=f"mend these {kind}, or leave them out")
