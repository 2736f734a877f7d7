"""The files of a run folder that a page may show: in the folder, which may be a stranger's, and not too large."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prfl.utils.console import warn
from prfl.utils.metrics_file import records

Made = TypeVar("Made")
MIB = 2**20
TEXT, TABLE, VIDEO = 1 * MIB, 256 * MIB, 64 * MIB  # the most of a file
VIDEOS = 512 * MIB  # and of all videos together: a page lies in memory whole
STRIPS = 32 * MIB  # of the videos that show a run's steps, which a page can do without


def there(path: Path) -> bool:
    """Tell whether there is a file, or a link to nothing."""
    return path.exists() or path.is_symlink()


class RunFiles:
    """The files below ``run``; each one that is there and not shown is in ``left_out``, with the reason.

    A link that leads out of the folder, and a path that does, is not followed: a page that is mailed must not carry
    files of whoever made it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run.resolve()
        self.left_out: list[str] = []
        self.room = VIDEOS

    def resolve(self, path: Path, most: int = TEXT) -> Path | None:
        """Find where a file really is; None, and a line in ``left_out``, where it may not or cannot be read."""
        try:
            resolved = path.resolve(strict=True)
            if reason := self._why_not(resolved, most):
                self.leave_out(path, reason)
                return None
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL in a name
            self.leave_out(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
            return None
        return resolved

    def _why_not(self, resolved: Path, most: int) -> str:
        """Say why a file is not shown, or ""."""
        if not resolved.is_relative_to(self.run):
            return "leads out of the run folder"
        if not resolved.is_file():
            return "is no file"
        size = resolved.stat().st_size
        return f"has {size / MIB:.1f} MiB, more than the {most / MIB:.0f} of a page" if size > most else ""

    def read(self, path: Path, most: int = TEXT) -> bytes | None:
        """Read a file of at most so many bytes; None where it is left out."""
        resolved = self.resolve(path, most)
        try:
            return resolved.read_bytes() if resolved else None
        except OSError as error:
            self.leave_out(path, f"cannot be read ({error.strerror})")
            return None

    def text(self, path: Path, most: int = TEXT) -> str | None:
        content = self.read(path, most)
        return None if content is None else content.decode("utf-8", "replace")

    def json(self, path: Path, *keys: str) -> dict[str, Any] | None:
        """Read an object that has these keys; None where it is not there or left out."""
        if not there(path) or (text := self.text(path, TABLE)) is None:
            return None
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.leave_out(path, f"is not as prfl writes it ({error})")
            return None
        if not isinstance(value, dict) or any(key not in value for key in keys):
            self.leave_out(path, f"is not as prfl writes it (no object with {', '.join(keys)})")
            return None
        return value

    def records(self, path: Path) -> list[dict[str, Any]]:
        """Read the records of a metrics.jsonl."""
        resolved = self.resolve(path, TABLE)
        complete, damaged = records(resolved) if resolved else ([], 0)
        if damaged:
            self.leave_out(path, f"{damaged} lines of it are damaged")
        return complete

    def video(self, path: Path) -> bytes | None:
        """Read a video, as long as there is room on the page."""
        content = self.read(path, min(VIDEO, self.room)) if self.is_video(path) else None
        self.room -= len(content or b"")
        return content

    def is_video(self, path: Path) -> bool:
        """Tell by its name whether a file may be a video that prfl wrote; one that is not is left out."""
        if path.suffix != ".mp4":
            self.leave_out(path, "is not a video that prfl wrote")
        return path.suffix == ".mp4"

    def small(self, paths: Sequence[Path]) -> bool:
        """Tell whether all these videos together are small enough to be strips in the page."""
        sizes = [resolved.stat().st_size for path in paths if (resolved := self.resolve(path, VIDEO))]
        return sum(sizes) <= STRIPS

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{path}: {reason}")

    def attempt(self, path: Path, make: Callable[[], Made], otherwise: Made) -> Made:
        """Return what ``make`` makes of a file, or ``otherwise`` where it is missing or not as prfl writes it."""
        if not there(path):
            return otherwise
        try:
            return make()
        except Exception as error:  # whatever a strange file comes to: a report ends no run
            self.leave_out(path, f"is not as prfl writes it ({type(error).__name__}: {error})"[:200])
            return otherwise

    def section(self, path: Path, make: Callable[[], str]) -> str:
        """Return the section that ``make`` makes of a file; "" where there is none."""
        return self.attempt(path, make, "")

    def tell(self) -> None:
        """Warn of every file that is left out."""
        for line in self.left_out:
            warn(f"the page leaves out {line}")
