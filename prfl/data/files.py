"""Small habits with files: write whole or not at all, hash contents, read lines of JSON with their numbers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl.errors import PrflError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the disk refuses (it is full, read-only, no folder) into a PrflError that names ``path``."""
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
    """What to do about what the disk says; safetensors gives the number in words."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number == errno.ENOSPC:
        return f"free some space or choose another folder{_free(path)}"
    return REMEDIES.get(number or 0, "see what the disk says of it, or choose another folder")


def _free(path: Path) -> str:
    place = next((folder for folder in path.absolute().parents if folder.is_dir()), None)
    return "" if place is None else f" ({shutil.disk_usage(place).free / 2**30:.1f} GiB are free there)"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour of ``path`` to write to; it takes path's name at the end, or vanishes on any error.

    So a reader sees the old file, the new one or none, never a half.  The name keeps its suffix.
    Raises PrflError when the folder cannot be made or the disk is full.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # there is no folder that it could be in
            temporary.unlink()


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """``replacing`` for a folder: an empty neighbour to fill, which is forced to the disk before it takes path's name.

    A folder cannot take the place of another in one step: the old one is moved aside first.  Killed between the two,
    a run leaves it as ``.old-NAME``, and ``restore_folders`` gives it its name back.
    """
    temporary, old = path.with_name(f".tmp-{path.name}"), path.with_name(f".old-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while it wrote
    try:
        with writing(path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in (*temporary.rglob("*"), temporary):
                _flush(written)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def restore_folders(parent: Path) -> None:
    """Clean up after ``replacing_folder`` was killed: half-written folders go, those moved aside come back."""
    for half in parent.glob(".tmp-*"):
        shutil.rmtree(half, ignore_errors=True)
    for old in parent.glob(".old-*"):
        final = old.with_name(old.name.removeprefix(".old-"))
        if final.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, final)


def _flush(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folder, and looks after its list by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: Path, fix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.  Raises PrflError when it is absent, truncated or lies."""
    try:
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}
    except FileNotFoundError as error:
        raise PrflError("there is no such file", where=str(path), fix=fix) from error
    except (SafetensorError, OSError) as error:
        raise PrflError(f"is damaged: {error}", where=str(path), fix=fix) from error


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes.  Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would silently keep the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key '{repeated}' stands twice")
    return found


def text_of(path: Path) -> str:
    """The whole of a UTF-8 file.  Raises PrflError that names the line where it is not."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors begin a file with this mark
    except OSError as error:
        raise PrflError(
            f"cannot be read: {error.strerror}", where=str(path), fix="let this user read it, or name another file"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PrflError("is not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from error


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """(``file:line``, text) of every line that is not blank, stripped.  Raises PrflError."""
    lines = enumerate(text_of(path).split("\n"), start=1)
    return [(f"{path}:{number}", text.strip()) for number, text in lines if text.strip()]


def json_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(``file:line``, object) of every line of a JSONL file.  Raises PrflError."""
    rows = []
    for where, text in numbered_lines(path):
        try:
            row = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
            raise PrflError(f"is not JSON: {error}", where=where, fix="write one JSON object on each line") from error
        if not isinstance(row, dict):
            raise PrflError(f"is a {type(row).__name__}, not an object", where=where, fix='write {"prompt": ..., ...}')
        rows.append((where, row))
    return rows


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The end of a remedy: the nearest known word, and all of them."""
    near = get_close_matches(word, known, n=1)
    guess = f"did you mean '{near[0]}'? " if near else ""
    return f"{guess}known: {', '.join(known)}"
