"""Let one process at a time write into a folder: the file ``run.lock`` in it names that process, the holder.

The file is locked (flock), so the kernel releases it when the process ends, for whatever reason.  On a file system
without locks, the content of the file decides.  On some file systems, other machines do not see the locks: so the
holder regularly checks that the file still names it (``FolderLock.check``), and ends if another process has taken the
folder.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from prfl.utils import processes
from prfl.utils.console import warn
from prfl.utils.errors import GuardError, PrflError
from prfl.utils.files import disk_errors

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"


@dataclass(frozen=True)
class Holder:
    """A process that writes into a folder.  token: a random text that differs even if a process id is used again."""

    host: str
    process: int
    started: float  # of the process, in seconds since 1970
    since: str
    command: str
    token: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} ({self.command}; since {self.since})"

    def is_gone(self) -> bool:
        """Tell whether the process has ended; False for a process of another machine, which cannot be checked."""
        if self.host != socket.gethostname():
            return False
        try:  # a later process may have the same number
            return abs(psutil.Process(self.process).create_time() - self.started) > 2
        except psutil.NoSuchProcess:
            return True


class FolderLock:
    """A folder that this process may write into.  handle: the open lock file; None on all but the main process."""

    def __init__(self, path: Path, holder: Holder, handle: int | None) -> None:
        self.path, self.holder, self.handle = path, holder, handle

    def check(self) -> None:
        """Check that the folder is still this process's; a lock file that somebody deleted is written again.

        Raises GuardError when another process has taken the folder.
        """
        if self.handle is None:
            return

        try:
            holder = _read(self.path)
        except FileNotFoundError:
            os.close(self.handle)
            self.handle = None
            try:
                self.handle = _acquire(self.path, self.holder)
            except PrflError as error:  # another process was faster
                raise GuardError(error.what, where=error.where, fix=error.fix) from error
            return
        except OSError:  # a file that cannot be read just now is no reason to end a run
            return

        if holder and holder.token != self.holder.token:
            what = f"{holder} has taken the folder, so this process ({self.holder.process}) ends and saves nothing more"
            raise GuardError(what, where=str(self.path.parent), fix="let one process write into a run folder")

    def release(self) -> None:
        """Let go of the folder, and remove the lock file."""
        if self.handle is None:
            return
        with suppress(OSError):  # removed while it is held, so that no other process locks a file without a name
            holder = _read(self.path)
            if holder and holder.token == self.holder.token:
                self.path.unlink()
        os.close(self.handle)
        self.handle = None


HELD: dict[Path, FolderLock] = {}  # by this process


@contextmanager
def folder_lock(folder: Path) -> Iterator[FolderLock]:
    """Hold a folder inside the block.  A missing folder is made, and removed at the end if it is still empty.

    A process that already holds the folder may enter again.  In a run of several processes, the main process holds the
    folder for all of them.
    Raises PrflError, on all processes, that names the process which holds the folder.
    """
    folder = folder.resolve()
    if folder in HELD and HELD[folder].holder.process == os.getpid():
        yield HELD[folder]
        return

    # The main process takes the lock, and all of them hear whether it got it.
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    lock = FolderLock(folder / NAME, _self(), None)
    refusal: tuple[str, str, str] | None = None
    if processes.is_main():
        try:
            with disk_errors(lock.path):
                folder.mkdir(parents=True, exist_ok=True)
                lock.handle = _acquire(lock.path, lock.holder)
        except PrflError as error:
            refusal = (error.what, error.where, error.fix)
    if refusal := processes.gather(refusal)[0]:
        what, where, fix = refusal
        raise PrflError(what, where=where, fix=fix)

    HELD[folder] = lock
    try:
        yield lock
    finally:
        del HELD[folder]
        lock.release()
        for parent in missing if processes.is_main() else ():
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _self() -> Holder:
    started = psutil.Process().create_time()
    since = datetime.now(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")
    command = " ".join(["prfl", *sys.argv[1:]])[:200]
    return Holder(socket.gethostname(), os.getpid(), started, since, command, secrets.token_hex(8))


def _acquire(path: Path, holder: Holder) -> int:
    """Open the lock file, lock it, and write ``holder`` into it.  Raises PrflError when another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _flock(handle)
            if locked is False:
                raise _held(path)
            former = _read(path)
            if locked is None and former and not former.is_gone():
                raise _held(path, f"; if that process has ended, delete {path}")

            if not os.path.samestat(os.fstat(handle), os.stat(path)):  # the holder has just ended, and removed it
                os.close(handle)
                continue

            if former:
                warn(f"{path} was left by {former}, which has ended: taken over")
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps(asdict(holder)).encode())
            if locked is None:  # of two that came at once, the one that wrote last has it
                time.sleep(0.5)
                if (latest := _read(path)) and latest.token != holder.token:
                    raise _held(path)
        except FileNotFoundError:
            os.close(handle)
        except BaseException:
            os.close(handle)
            raise
        else:
            return handle


def _flock(handle: int) -> bool | None:
    """Try to lock the file; returns whether this process has the lock, None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _held(path: Path, more: str = "") -> PrflError:
    """Make the error that names the holder."""
    for _ in range(20):  # the other may be about to write its name
        if holder := _read(path):
            break
        time.sleep(0.05)
    return PrflError(
        f"{holder or 'another process'} writes into this folder",
        where=str(path.parent),
        fix=f"wait until it ends, stop it, or use another folder (run=FOLDER){more}",
    )


def _read(path: Path) -> Holder | None:
    """Read the holder; None where the file holds nothing that makes sense.  Raises OSError."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None
