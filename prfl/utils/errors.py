"""The one exception for a mistake that the user can mend: what is wrong, where, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prfl.utils.text import visible

SHOWN = 20  # how many faults of a file are listed; more would only repeat the pattern


class PrflError(ValueError):
    """A mistake that the user can mend.  The command line shows it without a traceback.

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
        """What is wrong and how to mend it, on one line without the place: a list of errors puts it in front."""
        return f"{self.what} ({self.fix})" if self.fix else self.what


class AbsentError(PrflError):
    """A file or folder does not exist.  path: the path as the user gave it."""

    def __init__(self, what: str, *, path: Path, fix: str, where: str = "") -> None:
        self.path = path
        super().__init__(what, where=where or str(path), fix=fix)


class GuardError(PrflError):
    """An error after which a run must end at once, without saving anything."""


@contextmanager
def error_location(where: str) -> Iterator[None]:
    """Add ``where`` to a PrflError raised inside that has none, because its code does not know the yaml path."""
    try:
        yield
    except PrflError as error:
        if error.where:
            raise
        raise type(error)(error.what, where=where, fix=error.fix) from error


class Faults:
    """Collects the faults of a file's rows, or of other inputs, so that one error can list them all."""

    def __init__(self) -> None:
        self.errors: list[PrflError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Catch a PrflError raised inside and keep it; execution goes on after the block."""
        try:
            yield
        except PrflError as error:
            self.errors.append(error)

    def raise_all(self, where: str | Path, kind: str = "rows") -> None:
        """Raise the collected faults, if any: a single one as it is, several as one error that lists each remedy."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            # Count rows: a row may have several faults, and an error located at ``where`` itself counts as one row.
            rows = [str(error.where) for error in self.errors]
            count = len({row for row in rows if row != str(where)}) + rows.count(str(where))
            alone = f"one of the {kind} is wrong in {len(rows)} ways"
            lines = [f"{count} {kind} are wrong" if count > 1 else alone]
            lines += [f"  {error.where}: {error.one_line}" for error in self.errors[:SHOWN]]
            if len(self.errors) > SHOWN:
                lines.append(f"  and {len(self.errors) - SHOWN} more")
            raise PrflError("\n".join(lines), where=str(where), fix=f"mend these {kind}, or leave them out")
