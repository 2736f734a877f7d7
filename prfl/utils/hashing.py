"""Hashes of values and of files.

Hashes of files are remembered between commands, so that a terabyte of videos is read once and not at every start.

They are stored in one SQLite file in the user's cache folder, or in the file that PRFL_HASHES names (``off``: not
stored).  A hash is trusted while the file's size, times and inode are unchanged.  It is not stored for a file that
changed in the last seconds before it was read: a second change within the clock's resolution would go unnoticed.  Where
the store cannot be read or written, files are simply hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

SETTLED = 2.0  # seconds after a change, from which on the next change is sure to alter the file's times
SMALL = 2**16  # bytes; reading a file up to this size is as fast as looking its hash up


def json_hash(value: Any, *, sort_keys: bool = True) -> str:
    """Hash a value as JSON writes it: 64 hexadecimal digits of sha256.

    sort_keys: whether the order of a mapping's keys makes no difference.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash a file's bytes: 64 hexadecimal digits of sha256.  Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered_hash(path: Path) -> str:
    """Hash a file as ``content_hash``, without reading it if it is unchanged since the last time.  Raises OSError."""
    facts = _facts(path)
    memory = _memory_file()
    if memory is None or path.stat().st_size <= SMALL:
        return content_hash(path)

    file = str(path.resolve())
    with suppress(OSError, sqlite3.Error):
        row = _opened(memory, os.getpid()).execute("SELECT facts, hash FROM hashes WHERE file = ?", (file,)).fetchone()
        if row and row[0] == facts:
            return str(row[1])

    digest = content_hash(path)
    changed = path.stat()
    if _facts(path) == facts and time.time() - max(changed.st_mtime, changed.st_ctime) > SETTLED:
        _remember(memory, file, facts, digest)
    return digest


def _facts(path: Path) -> str:
    """Describe the file's state.  ctime reveals a change even if the modification time was set back after it."""
    now = path.stat()
    return f"{now.st_size} {now.st_mtime_ns} {now.st_ctime_ns} {now.st_ino} {now.st_dev}"


def _memory_file() -> Path | None:
    named = os.environ.get("PRFL_HASHES")
    if named == "off":
        return None
    with suppress(RuntimeError):  # no home folder
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(named) if named else folder / "prfl" / "hashes.sqlite"
    return None


@lru_cache(maxsize=1)
def _opened(memory: Path, process: int) -> sqlite3.Connection:
    """Open the store once per process: a connection must not be used after a fork."""
    memory.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(memory, timeout=1, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")  # what a crash damages is made again
    connection.execute("CREATE TABLE IF NOT EXISTS hashes (file TEXT PRIMARY KEY, facts TEXT, hash TEXT)")
    return connection


def _remember(memory: Path, file: str, facts: str, digest: str) -> None:
    with suppress(OSError, sqlite3.Error):
        try:
            _opened(memory, os.getpid()).execute(
                "INSERT OR REPLACE INTO hashes VALUES (?, ?, ?)", (file, facts, digest)
            )
        except sqlite3.OperationalError:  # busy, full, read-only
            pass
        except sqlite3.DatabaseError:  # damaged
            _opened.cache_clear()
            memory.unlink()
