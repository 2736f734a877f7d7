"""A value's hash stays that of saved ones.  An unchanged file is read once, and no changed one is trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prfl.utils import hashing
from prfl.utils.hashing import SMALL, content_hash, json_hash, remembered_hash

SIZE = SMALL + 1


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read to the end, in a memory of this test's own."""
    monkeypatch.setenv("PRFL_HASHES", str(tmp_path / "memory" / "hashes.sqlite"))
    hashing._opened.cache_clear()
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return content_hash(path)

    monkeypatch.setattr(hashing, "content_hash", counted)
    return names


@pytest.fixture
def video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"a" * SIZE)
    later = path.stat().st_ctime + 60  # without waiting for it
    monkeypatch.setattr(hashing.time, "time", lambda: later)
    return path


def test_a_values_hash_stays_that_of_saved_rewards_and_checkpoints() -> None:
    value = {"b": [1, 2.5], "a": "ü"}
    assert json_hash(value) == "31aa6946b90c293864bcc13c0267ab43cbb60df95910d625791989be705dd376"
    assert json_hash(value) == json_hash(dict(reversed(value.items())))
    assert json_hash(value, sort_keys=False) == "edaebaa1b824ee78145cb3f7f6f70bc69a9be1e5bba746b16a5906fd1c4dffbb"


def test_a_file_is_read_once(read: list[str], video: Path) -> None:
    first = remembered_hash(video)
    hashing._opened.cache_clear()  # another process
    assert remembered_hash(video) == first == content_hash(video) and read == ["video.mp4"]


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_file_that_changed_is_read_again(read: list[str], video: Path, keep_times: bool) -> None:
    remembered_hash(video)
    times = video.stat()
    video.write_bytes(b"b" * SIZE)
    if keep_times:  # as rsync and a bad copy may: the size and the time of modification are the same
        os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert remembered_hash(video) == content_hash(video) and len(read) == 2


def test_a_file_that_has_just_changed_is_not_trusted(read: list[str], video: Path, monkeypatch) -> None:
    soon = video.stat().st_ctime + hashing.SETTLED / 2
    monkeypatch.setattr(hashing.time, "time", lambda: soon)
    for _ in range(2):
        remembered_hash(video)
    assert len(read) == 2


def test_another_file_in_its_place_is_read(read: list[str], video: Path) -> None:
    remembered_hash(video)
    other = video.with_name("other")
    other.write_bytes(b"c" * SIZE)
    os.replace(other, video)
    assert remembered_hash(video) == content_hash(video)


@pytest.mark.parametrize("state", ["off", "damaged", "no folder"])
def test_without_a_memory_files_are_read(read: list[str], video: Path, tmp_path: Path, monkeypatch, state: str) -> None:
    if state == "off":
        monkeypatch.setenv("PRFL_HASHES", "off")
    elif state == "damaged":
        (tmp_path / "memory").mkdir()
        (tmp_path / "memory/hashes.sqlite").write_bytes(b"no database" * 100)
    else:
        monkeypatch.setenv("PRFL_HASHES", str(video / "in a file"))
    assert remembered_hash(video) == remembered_hash(video) == content_hash(video)
    assert len(read) == 2


def test_an_absent_file_is_an_oserror(read: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        remembered_hash(tmp_path / "nowhere")
