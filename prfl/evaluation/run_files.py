"""What a page may show of a run folder, which may be a stranger's: files in it, of a size that a page can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prfl.utils.console import warn
from prfl.utils.files import records

MIB = 2**20
TEXT, TABLE, VIDEO = 1 * MIB, 256 * MIB, 64 * MIB  # the most of a file
VIDEOS = 512 * MIB  # and of all videos together: a page lies in memory whole


def there(path: Path) -> bool:
    """Also where it is a link to nothing."""
    return path.exists() or path.is_symlink()


class RunFiles:
    """Reads files below ``run``; every one that is there and not shown is in ``left_out``, with the reason.

    A link that leads out of the folder, and a path that does, is not followed: a page that is mailed must not carry
    files of whoever made it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run.resolve()
        self.left_out: list[str] = []
        self.room = VIDEOS

    def place(self, path: Path, most: int = TEXT) -> Path | None:
        """Where a file really is; None, and a line in ``left_out``, where it may not or cannot be read."""
        try:
            place = path.resolve(strict=True)
            if reason := self._why_not(place, most):
                self.leave_out(path, reason)
                return None
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL in a name
            self.leave_out(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")
            return None
        return place

    def _why_not(self, place: Path, most: int) -> str:
        if not place.is_relative_to(self.run):
            return "leads out of the run folder"
        if not place.is_file():
            return "is no file"
        size = place.stat().st_size
        return f"has {size / MIB:.1f} MiB, more than the {most / MIB:.0f} of a page" if size > most else ""

    def read(self, path: Path, most: int = TEXT) -> bytes | None:
        place = self.place(path, most)
        try:
            return place.read_bytes() if place else None
        except OSError as error:
            self.leave_out(path, f"cannot be read ({error.strerror})")
            return None

    def text(self, path: Path, most: int = TEXT) -> str | None:
        content = self.read(path, most)
        return None if content is None else content.decode("utf-8", "replace")

    def json(self, path: Path, *keys: str) -> dict[str, Any] | None:
        """An object that has these keys."""
        if not there(path) or (text := self.text(path, TABLE)) is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.leave_out(path, f"is not as prfl writes it ({error})")
            return None
        if not isinstance(found, dict) or any(key not in found for key in keys):
            self.leave_out(path, f"is not as prfl writes it (no object with {', '.join(keys)})")
            return None
        return found

    def records(self, path: Path) -> list[dict[str, Any]]:
        """Those of a metrics.jsonl."""
        place = self.place(path, TABLE)
        found, damaged = records(place) if place else ([], 0)
        if damaged:
            self.leave_out(path, f"{damaged} lines of it are damaged")
        return found

    def video(self, path: Path) -> bytes | None:
        if path.suffix != ".mp4":
            self.leave_out(path, "is not a video that prfl wrote")
            return None
        content = self.read(path, min(VIDEO, self.room))
        self.room -= len(content or b"")
        return content

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{path}: {reason}")

    def section(self, path: Path, make: Callable[[], str]) -> str:
        """What ``make`` makes of a file, or nothing where that is not as prfl writes it."""
        if not there(path):
            return ""
        try:
            return make()
        except Exception as error:  # whatever a strange file comes to: a report ends no run
            self.leave_out(path, f"is not as prfl writes it ({type(error).__name__}: {error})"[:200])
            return ""

    def tell(self) -> None:
        for line in self.left_out:
            warn(f"the page leaves out {line}")
