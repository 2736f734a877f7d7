"""Write files whole or not at all, and read them back even if a crash may have damaged them."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl.utils.console import warn
from prfl.utils.errors import PrflError
from prfl.utils.reading import disk_error_number, disk_refuses, unreadable


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk (full, read-only, not a folder) into a PrflError that names ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):  # its own words for an OSError
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        fix = f"{_remedy(error, path)}; what was written before is whole"
        raise PrflError(f"cannot be written: {reason}", where=str(path), fix=fix) from error


REMEDIES = {
    errno.EDQUOT: "free some of your quota or choose another folder",
    errno.EFBIG: "choose a folder on a disk that takes files of this size (ulimit -f may limit them too)",
    errno.EACCES: "let this user write there (chmod, chown), or choose another folder",
    errno.EPERM: "let this user write there (chmod, chown), or choose another folder",
    errno.EROFS: "choose a folder on a disk that can be written to",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.ENOTDIR: "a file stands where a folder is needed: remove it or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: remove it or choose another folder",
    errno.EISDIR: "a folder has this name: remove it or choose another name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (ulimit -n)",
    errno.EBUSY: "end the program that uses it, or choose another folder",
    errno.ETXTBSY: "end the program that uses it, or choose another folder",
    errno.EIO: "the disk or its connection fails: see the system's log (dmesg), or choose a folder on another one",
    errno.ESTALE: "the network disk lost its connection: mount it again, or choose another folder",
}


def _remedy(error: Exception, path: Path) -> str:
    """Choose the remedy for an error of the disk."""
    number = disk_error_number(error)
    if number == errno.ENOSPC:
        return f"free some space or choose another folder{_free(path)}"
    return REMEDIES.get(number or 0, "see what the disk says of it, or choose another folder")


def _free(path: Path) -> str:
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), None)
    return "" if folder is None else f" ({shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there)"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` to write to.  At the end it is renamed to ``path``; on an error, removed.

    So a reader sees the old file, the new one or none, never half of one.  This holds after a loss of power too,
    because the content is forced to the disk first.  The temporary name has the same suffix as ``path``.
    Raises PrflError when the folder cannot be made or the disk is full.
    """
    temporary = _neighbour(path, "tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # there is no folder that it could be in
            temporary.unlink()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill.  At the end it is forced to the disk and renamed to ``path``.

    One folder cannot replace another in a single step, so the old one is moved aside first.  If a run is killed between
    the two steps, the old folder is left as ``.old-TOKEN-NAME``, and ``restore_folders`` gives it its name back.
    """
    temporary, old = _neighbour(path, "tmp"), _neighbour(path, "old")
    try:
        with disk_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in (*temporary.rglob("*"), temporary):
                _flush(written)
            if path.exists() or path.is_symlink():
                os.replace(path, old)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        _remove(temporary)
    _remove(old)


def restore_folders(parent: Path) -> None:
    """Clean up after ``atomic_write`` and ``atomic_folder`` were killed: remove what is half written, and give folders
    that were moved aside their names back.  For a folder into which no other process writes."""
    for half in parent.glob(".tmp-*"):
        _remove(half)
    for old in parent.glob(".old-*"):
        final = old.with_name(re.sub(r"^\.old-(?:[0-9a-f]{8}-)?", "", old.name))
        if final.exists():
            _remove(old)
        else:
            os.replace(old, final)


def remove_folder(path: Path) -> str | None:
    """Remove a folder, or a link to one; returns why it could not be removed, or None.

    It is renamed first, so that what a crash leaves of it is not taken for a whole folder.
    """
    half = _neighbour(path, "tmp")
    try:
        os.replace(path, half)
        half.unlink() if half.is_symlink() else shutil.rmtree(half)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, or as much of it as can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _neighbour(path: Path, kind: str) -> Path:
    """Make a hidden name that no other process uses.  It is random: two containers may both have a process 1."""
    return path.with_name(f".{kind}-{secrets.token_hex(4)}-{path.name}")


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder, and looks after its list by itself
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


CACHE_TAG, OUTPUT_TAG = "CACHEDIR.TAG", ".prfl-output"
_TAGS = {
    CACHE_TAG: "Signature: 8a477f597d28d172789f06886806bc55\n# Written by prfl, which can make it again: "
    "backups may leave this folder out (https://bford.info/cachedir).\n",
    OUTPUT_TAG: "# Written by prfl: not a source of videos.\n",
}


def mark_written(folder: Path, tag: str = OUTPUT_TAG) -> None:
    """Mark a folder as written by prfl, so that it is not taken for a folder of the user's videos.

    tag: CACHE_TAG for a folder that can be made again, which backups may skip; OUTPUT_TAG for any other.
    """
    if not (folder / tag).exists():
        with atomic_write(folder / tag) as temporary:
            temporary.write_text(_TAGS[tag], encoding="utf-8")


def written_by_prfl(folder: Path) -> bool:
    """Tell whether ``mark_written`` marked the folder.  Cache folders of other programs do not count."""
    if (folder / OUTPUT_TAG).is_file():
        return True
    try:
        return b"prfl" in (folder / CACHE_TAG).read_bytes()
    except OSError:
        return folder.name == "samples" and (folder.parent / "metrics.jsonl").is_file()  # a run older than the marks


def read_tensors(path: Path, fix: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, on the CPU.  Raises PrflError when it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error, fix) from error
        raise PrflError(f"is damaged: {error}", where=str(path), fix=fix) from error


def whole_json(path: Path, *keys: str) -> dict[str, Any] | None:
    """Read the object with these keys from a JSON file of a run.

    Returns None where there is no such file.  A damaged file gives None and a warning, because a measurement can be
    repeated and must not end a run.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in keys if key not in content]
        if not isinstance(content, dict) or missing:
            raise ValueError(f"no object with {', '.join(keys)}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        _left_out(path, str(error))
        return None
    return content


@cache
def _left_out(path: Path, reason: str) -> None:
    """Warn of a file once."""
    warn(f"{path} is damaged ({reason}) and is left out")
