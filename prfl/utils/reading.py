"""Read files that a user named, as text, lines or JSON.  Errors of the disk become a PrflError with a remedy."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from prfl.utils.errors import AbsentError, Faults, PrflError
from prfl.utils.text import closest

# Remedies for errors of the disk, other than a missing file or a folder in its place.
REMEDIES = {
    errno.EACCES: "let this user read it (chmod, chown), or name another file",
    errno.EPERM: "let this user read it (chmod, chown), or name another file",
    errno.ENAMETOOLONG: "name a file that is there",
    errno.ELOOP: "its links lead to each other: name the file itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or its connection fails: see the system's log (dmesg)",
    errno.ESTALE: "the network disk lost its connection: mount it again",
}


def unreadable(path: Path, error: OSError, fix: str = "name a file that is there") -> PrflError:
    """Make the error of a file that cannot be read.  fix: the remedy if the file is missing or is a folder."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return absent(path, fix)
    if os.path.isdir(path):
        return PrflError("is a folder, not a file", where=str(path), fix=fix)
    remedy = REMEDIES.get(disk_error_number(error) or 0, "see what the disk says of it, or name another file")
    return PrflError(f"cannot be read: {error.strerror or error}", where=str(path), fix=remedy)


def disk_refuses(path: Path, error: Exception) -> bool:
    """Tell whether an error comes from the disk, and not from a library that finds the file damaged."""
    return isinstance(error, OSError) and (not os.path.isfile(path) or disk_error_number(error) in REMEDIES)


def disk_error_number(error: Exception) -> int | None:
    """Return an error's errno, or None.  safetensors only writes it in its message."""
    number = error.errno if isinstance(error, OSError) else None
    in_words = re.search(r"os error (\d+)", str(error))
    return number or (int(in_words[1]) if in_words else None)


def absent(path: Path, fix: str, what: str = "file") -> AbsentError:
    """Make the error of a path that does not exist.  what: what it should be, such as "file" or "folder".

    The message names the first missing folder of the path or, if the folder exists, an entry of similar spelling.
    """
    missing = [parent for parent in path.parents if not os.path.isdir(parent)]
    if missing:
        state = "is a file, not a folder" if os.path.exists(missing[-1]) else "is not there"
        return AbsentError(f"there is no such {what}: {missing[-1]} {state}", path=path, fix=fix)
    try:
        near = closest(path.name, os.listdir(path.parent))
    except OSError:  # a folder that may be entered and not listed
        near = None
    guess = f"did you mean {path.parent / near}? Else " if near else ""
    return AbsentError(f"there is no such {what}", path=path, fix=guess + fix)


def text_of(path: Path, fix: str = "name a file that is there") -> str:
    """Read a whole UTF-8 file.  Raises PrflError that names the line where it is not."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors begin a file with this mark
    except OSError as error:
        raise unreadable(path, error, fix) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PrflError("is not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from error


def printable(path: str | Path) -> str:
    """Write a file's name as text that is valid everywhere: bytes that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """Read (``file:line``, text) of every line that is not blank, stripped.  Raises PrflError."""
    lines = enumerate(text_of(path).split("\n"), start=1)
    return [(f"{path}:{number}", text.strip()) for number, text in lines if text.strip()]


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read (``file:line``, object) of every line of a JSONL file.  Raises PrflError."""
    rows, faults = [], Faults()
    for where, text in numbered_lines(path):
        with faults.collected():
            rows.append((where, _json_row(where, text)))
    faults.raise_all(path)
    return rows


def _json_row(where: str, text: str) -> dict[str, Any]:
    try:
        row = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        raise PrflError(f"is not JSON: {error}", where=where, fix="write one JSON object on each line") from error
    if not isinstance(row, dict):
        raise PrflError(f"is a {type(row).__name__}, not an object", where=where, fix='write {"prompt": ..., ...}')
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; json itself would silently keep the last of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{repeated}' stands twice")
    return fields
