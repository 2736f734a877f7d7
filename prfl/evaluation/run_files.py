"""What a page may show of a run folder, which may be a stranger's: files in it, of a size that a page can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prfl.console import console

MIB = 2**20
TEXT, TABLE, VIDEO = 1 * MIB, 256 * MIB, 64 * MIB  # the most of a file
VIDEOS = 512 * MIB  # and of all videos together: a page lies in memory whole


class RunFiles:
    """Reads files below ``run``; every one that is there and not shown is in ``left_out``, with the reason.

    A link that leads out of the folder, and a path that does, is not followed: a page that is mailed must not carry
    files of whoever made it.
    """

    def __init__(self, run: Path) -> None:
        self.run = run.resolve()
        self.left_out: list[str] = []
        self.room = VIDEOS

    def read(self, path: Path, most: int = TEXT) -> bytes | None:
        """None, and a line in ``left_out``, where it may not or cannot be read."""
        try:
            place = path.resolve(strict=True)
            if not place.is_relative_to(self.run):
                return self.leave_out(path, "leads out of the run folder")
            if not place.is_file():
                return self.leave_out(path, "is no file")
            if (size := place.stat().st_size) > most:
                return self.leave_out(path, f"has {size / MIB:.1f} MiB, more than the {most / MIB:.0f} of a page")
            return place.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL in a name
            return self.leave_out(path, f"cannot be read ({getattr(error, 'strerror', None) or error})")

    def text(self, path: Path, most: int = TEXT) -> str | None:
        content = self.read(path, most)
        return None if content is None else content.decode("utf-8", "replace")

    def json(self, path: Path) -> Any:
        return json.loads(self.text(path, TABLE) or "null")

    def video(self, path: Path) -> bytes | None:
        if path.suffix != ".mp4":
            return self.leave_out(path, "is not a video that prfl wrote")
        content = self.read(path, min(VIDEO, self.room))
        self.room -= len(content or b"")
        return content

    def leave_out(self, path: Path, reason: str) -> None:
        self.left_out.append(f"{path}: {reason}")

    def section(self, path: Path, make: Callable[[], str]) -> str:
        """What ``make`` makes of a file, or nothing where that is not as prfl writes it."""
        if not (path.exists() or path.is_symlink()):
            return ""
        try:
            return make()
        except Exception as error:  # whatever a strange file comes to: a report ends no run
            self.leave_out(path, f"is not as prfl writes it ({type(error).__name__}: {error})"[:200])
            return ""

    def tell(self) -> None:
        for line in self.left_out:
            console.print(f"warning: the page leaves out {line}", style="bold yellow", soft_wrap=True)
