"""One writer: a folder is held by one process, which the others name."""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from prfl.utils import lock as locks
from prfl.utils.errors import GuardError, PrflError
from prfl.utils.files import atomic_folder, atomic_write
from prfl.utils.lock import NAME, Holder, folder_lock

fcntl = pytest.importorskip("fcntl")


def holder(process: int, host: str | None = None) -> Holder:
    started = psutil.Process(process).create_time() if psutil.pid_exists(process) else 1.0
    return Holder(host or socket.gethostname(), process, started, "2026-01-01 00:00:00 UTC", "prfl train x.yaml", "t")


def write(folder: Path, who: Holder) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(asdict(who)))
    return folder / NAME


OTHER = holder(os.getppid())
ENDED = replace(OTHER, started=1.0)  # a process of the same number, long ago


def test_a_held_folder_is_refused_with_host_process_and_command(tmp_path):
    """flock belongs to the open file: another one of this process is like another process's."""
    path = write(tmp_path, OTHER)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PrflError, match="writes into this folder") as error, folder_lock(tmp_path):
            pass
    for part in (f"process {OTHER.process} on {OTHER.host}", "prfl train x.yaml", str(tmp_path), "run=FOLDER"):
        assert part in str(error.value)
    assert path.exists(), "the other's file stays"


def test_what_a_dead_process_left_is_taken_over_and_said(tmp_path, capsys):
    write(tmp_path, OTHER)  # as it stands there nobody holds it
    with folder_lock(tmp_path) as held:
        assert json.loads(held.path.read_text())["process"] == os.getpid()
    assert f"left by process {OTHER.process} on {OTHER.host}" in capsys.readouterr().out
    assert not (tmp_path / NAME).exists()


def test_the_same_process_may_ask_again_and_leaves_no_trace(tmp_path):
    with folder_lock(tmp_path / "runs" / "one") as outer:
        with folder_lock(tmp_path / "runs" / "one") as inner:
            assert inner is outer
        assert outer.path.exists()
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "runs" / "one"):
        (tmp_path / "runs" / "one" / "result").touch()
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["result"]


@pytest.mark.parametrize(
    ("there", "refused"), [(OTHER, True), (ENDED, False), (holder(os.getppid(), "elsewhere"), True)]
)
def test_where_the_file_system_has_no_locks_the_file_decides(tmp_path, monkeypatch, there, refused):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    path = write(tmp_path, there)
    if not refused:
        with folder_lock(tmp_path) as held:
            held.check()
        return
    with pytest.raises(PrflError, match=f"on {there.host}") as error, folder_lock(tmp_path):
        pass
    assert f"if that process has ended, delete {path}" in str(error.value)


def test_a_folder_that_another_process_took_is_given_up(tmp_path):
    with folder_lock(tmp_path) as held:
        held.check()
        held.path.unlink()  # by hand; whoever is first has it
        held.check()
        assert held.path.exists()
        held.path.write_text(json.dumps(asdict(OTHER)))  # a machine that does not see this one's locks
        with pytest.raises(GuardError, match=f"process {OTHER.process} .* has taken the folder"):
            held.check()
    assert held.path.exists(), "and its file is left alone"


def test_every_process_of_a_run_is_refused_alike(tmp_path, monkeypatch):
    """Only the main one looks; the others must not wait for it."""
    monkeypatch.setattr(locks.processes, "is_main", lambda: False)
    with folder_lock(tmp_path / "run") as held:
        held.check()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(locks.processes, "gather", lambda value: [("held", "there", "wait"), value])
    with pytest.raises(PrflError, match="there: held"), folder_lock(tmp_path / "run"):
        pass


def test_temporary_names_do_not_depend_on_the_process_number(tmp_path):
    """Two containers that share a folder may both have a process 1."""
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second
        first.touch()
        second.touch()
    with atomic_folder(tmp_path / "b") as first, atomic_folder(tmp_path / "b") as second:
        assert first != second
