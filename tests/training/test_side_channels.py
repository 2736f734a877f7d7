"""Nothing that stands beside a run ends it; what does end it saves first, and says so."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from prfl.training import signals
from prfl.training.loop import Hook
from prfl.training.regulariser import Regulariser
from prfl.training.run_folder import read_metrics
from prfl.utils import files, interrupts
from prfl.utils.errors import GuardError, PrflError
from prfl.utils.streams import lossy_output
from tests.training.test_loop import Line, go, weights

SAID = "cannot be written"


def at(step: int, call) -> Hook:
    return Hook(1, lambda now: (call() if now == step else None) or {})


def saved(tmp_path: Path, name: str = "run") -> list[str]:
    return sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------- side channels


def test_lines_that_cannot_be_written_wait(tmp_path, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"

    def lose() -> None:
        metrics.rename(tmp_path / "aside")
        metrics.mkdir()

    def mend() -> None:
        metrics.rmdir()
        (tmp_path / "aside").rename(metrics)

    assert go(tmp_path, Line(), hooks=[at(2, lose), at(4, mend)], log_every=1).step == 6
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count(f"warning: {metrics} {SAID} (Is a directory)") == 1


def test_lines_that_never_can_be_written_are_counted(tmp_path, capsys):
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert go(tmp_path, Line(), hooks=[at(4, lambda: metrics.unlink() or metrics.mkdir())]).step == 6
    assert f"2 lines could not be written to {metrics}" in capsys.readouterr().out


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    """A disk that fills in the middle of a line."""
    from prfl.training.logger import append

    path = tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n')
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            append(path, '{"step": 2}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '{"step": 1}\n'


def test_trackers_that_fail_are_begun_anew(tmp_path, capsys, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    log, steps = TensorBoardTracker.log, []

    def failing(self, values, step=None, **more):
        steps.append(step)
        if step in (2, 3, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        return log(self, values, step=step, **more)

    monkeypatch.setattr(TensorBoardTracker, "log", failing)
    assert go(tmp_path, Line(), trackers=["tensorboard"], log_every=1).step == 6
    assert steps == [1, 2, 3, 4, 6], "ever more seldom"
    said = capsys.readouterr().out
    assert said.count("warning: the tracker tensorboard fails ([Errno 28] No space left on device)") == 1
    assert len(list((tmp_path / "run" / "trackers").glob("events*"))) >= 2


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_standard_output_that_fails_is_said_once(tmp_path, monkeypatch, capsys, number):
    class Failing:
        def write(self, text=""):
            raise OSError(number, os.strerror(number))

        flush = write

        def __getattr__(self, name):
            return getattr(sys.__stdout__, name)

        def fileno(self):
            raise OSError

    monkeypatch.setattr(sys, "stdout", Failing())
    assert go(tmp_path, Line(), log_every=1).step == 6
    told = f"warning: the standard output {SAID} ({os.strerror(number)}); the work goes on\n"
    assert capsys.readouterr().err == told


def test_a_stream_that_works_again_is_used_again(monkeypatch, capsys):
    """A disk that was full for a while."""
    stream = sys.stdout
    with lossy_output():
        with monkeypatch.context() as patch:
            patch.setattr(stream, "write", lambda text: open("/nonexistent/file", "w"))
            print("lost", end="")
        print("there")
        assert not sys.stdout.broken
    assert capsys.readouterr().out == "there\n"


# ---------------------------------------------------------------------------------------------------------- the way out


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), KeyboardInterrupt(), ValueError("no")])
def test_an_error_saves_first_and_the_run_goes_on_from_there(tmp_path, capsys, error):
    def fails() -> None:
        raise error

    with pytest.raises(type(error)):
        go(tmp_path, Line(), hooks=[at(4, fails)], save_every=100)
    assert saved(tmp_path) == ["step-000004"]
    how = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by an error"
    assert f"{how} after step 4: saved {tmp_path}/run/checkpoints/step-000004" in capsys.readouterr().out
    go(tmp_path, Line())
    go(tmp_path, Line(), "straight")
    for key, value in weights(tmp_path, "straight", 6).items():
        assert torch.equal(value, weights(tmp_path, "run", 6)[key]), key


class Failing(Line):
    """Its gradient fails in step 4."""

    def accumulate(self, step, indices):
        if step == 4:
            raise MemoryError("none left")
        return super().accumulate(step, indices)


def test_an_error_in_the_middle_of_a_step_saves_the_step_before(tmp_path):
    with pytest.raises(MemoryError):
        go(tmp_path, Failing(), save_every=100)
    go(tmp_path, Line())
    go(tmp_path, Line(), "straight")
    for key, value in weights(tmp_path, "straight", 6).items():
        assert torch.equal(value, weights(tmp_path, "run", 6)[key]), key


def test_weights_of_no_step_are_not_saved_and_that_is_said(tmp_path, capsys):
    """The regulariser has stepped, the objective has not."""
    objective, other = Failing(), Line(seed=1)
    other.weight = objective.weight
    with pytest.raises(MemoryError):
        go(tmp_path, objective, regulariser=Regulariser(other, every=1))
    assert saved(tmp_path) == ["step-000003"]
    said = capsys.readouterr().out
    assert "after step 4: not saved, since the step after it had begun to change the weights" in said
    assert f"the last checkpoint is {tmp_path}/run/checkpoints/step-000003" in said


def test_a_guard_saves_nothing(tmp_path):
    def guard() -> None:
        raise GuardError("hacked", where="here", fix="stop")

    with pytest.raises(GuardError):
        go(tmp_path, Line(), hooks=[at(4, guard)])
    assert saved(tmp_path) == ["step-000003"]
    bad = Line()
    bad.poison = (4, float("nan"))
    with pytest.raises(GuardError, match="loss is nan in step 4"):
        go(tmp_path, bad, "bad", save_every=100)
    assert not (tmp_path / "bad" / "checkpoints").exists()
    bad.poison = (0, float("nan"))
    (tmp_path / "worse").mkdir()
    (tmp_path / "worse" / "failed").touch()  # nothing can be written below it
    with pytest.raises(GuardError, match=r"loss is nan in step 0(.|\n)*the batch could not be kept"):
        go(tmp_path, bad, "worse")


def test_what_cannot_be_saved_is_said_and_the_first_error_is_raised(tmp_path, capsys, monkeypatch):
    def fails() -> None:
        monkeypatch.setattr(files.os, "fsync", full)
        raise ValueError("the first")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="the first"):
        go(tmp_path, Line(), hooks=[at(4, fails)])
    said = capsys.readouterr().out
    assert "after step 4: not saved: cannot be written: No space left on device; the last checkpoint is" in said


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_closed_terminal_and_a_scheduler_s_warning_save(tmp_path, name):
    number = getattr(signal, name, None) or pytest.skip("not on this system")
    result = go(tmp_path, Line(), hooks=[at(2, lambda: os.kill(os.getpid(), number))])
    assert (result.step, result.stopped, result.checkpoint.name) == (2, name, "step-000002")
    assert signal.getsignal(number) is signal.SIG_DFL


def test_nohup_stays_in_force(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert go(tmp_path, Line(), hooks=[at(2, lambda: os.kill(os.getpid(), signal.SIGHUP))]).step == 6
    finally:
        signal.signal(signal.SIGHUP, before)


class Signalled(Line):
    """Gets signals in the middle of its third step."""

    def __init__(self, *numbers: int, between: float = 0.0) -> None:
        super().__init__()
        self.numbers, self.between = numbers, between

    def accumulate(self, step, indices):
        for number in self.numbers if step == 2 else ():
            os.kill(os.getpid(), number)
            time.sleep(self.between)
        return super().accumulate(step, indices)


def test_a_repeated_signal_is_the_same_wish(tmp_path):
    """A terminal's Ctrl-C reaches the launcher too, which passes it on."""
    result = go(tmp_path, Signalled(signal.SIGINT, signal.SIGINT, signal.SIGTERM))
    assert (result.step, result.stopped) == (3, "SIGINT") and saved(tmp_path) == ["step-000003"]


def test_a_second_signal_after_a_while_breaks_the_step_off_and_saves_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, Signalled(signal.SIGINT, signal.SIGINT, between=0.01), save_every=100)
    assert saved(tmp_path) == ["step-000002"]


def test_a_save_is_not_broken_off(tmp_path, monkeypatch):
    """By whatever comes, however often; neither is one on the way out."""
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    flush = os.fsync

    def signalled(handle):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)
        flush(handle)

    def fails() -> None:
        raise ValueError

    monkeypatch.setattr(files.os, "fsync", signalled)
    with interrupts.ended_by_signals():
        monkeypatch.setattr("prfl.training.run_folder.RunFolder.begin", lambda self: self.path.mkdir(exist_ok=True))
        result = go(tmp_path, Line())
        assert (result.step, result.stopped) == (3, "SIGTERM") and saved(tmp_path) == ["step-000003"]
        with pytest.raises(ValueError):
            go(tmp_path, Line(), "other", hooks=[at(2, fails)])
        assert saved(tmp_path, "other") == ["step-000002"]


def test_outside_a_run_repeated_signals_are_one_interrupt():
    with interrupts.ended_by_signals():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGHUP)  # while it cleans up
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ------------------------------------------------------------------------------------------------- what a crash leaves


@pytest.mark.parametrize("rest", [b"\0" * 64, b'{"step": 3, "lo', b"\0\0\0\n[1]\n", b'{"step": null}\n\xff\xfe\n'])
def test_damaged_lines_are_dropped_and_counted(tmp_path, capsys, rest):
    go(tmp_path, Line(), steps=3)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + rest)
    go(tmp_path, Line())
    assert [record["step"] for record in read_metrics(metrics)] == [1, 2, 3, 4, 5, 6]
    lost = len(rest.splitlines()) if b"\n" in rest else 1
    assert f"{metrics}: {lost} damaged lines" in capsys.readouterr().out
    assert b"\0" not in metrics.read_bytes()


def test_an_old_checkpoint_that_is_a_link_or_busy_ends_nothing(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    elsewhere = tmp_path / "elsewhere"

    def move() -> None:
        (folder / "step-000002").rename(elsewhere)
        (folder / "step-000002").symlink_to(elsewhere)

    rmtree = files.shutil.rmtree

    def busy(path, **more):
        if "step-000004" in str(path) and not more:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rmtree(path, **more)

    monkeypatch.setattr(files.shutil, "rmtree", busy)
    assert go(tmp_path, Line(), hooks=[at(2, move)], save_every=1, keep=1).step == 6
    assert elsewhere.is_dir(), "what a link points to is not ours"
    said = capsys.readouterr().out
    assert "step-000004, which is no longer needed, cannot be removed: Device or resource busy" in said
    assert said.count("warning") == 1
    go(tmp_path, Line(), steps=7)
    assert saved(tmp_path) == ["step-000006", "step-000007"], "a later start removes what is left"


def test_what_was_half_written_anywhere_in_the_run_is_removed(tmp_path):
    go(tmp_path, Line(), steps=3)
    run = tmp_path / "run"
    (run / "samples" / "step-000002").mkdir(parents=True)
    (run / "samples" / "step-000002" / ".tmp-01234567-results.json").touch()
    (run / ".old-01234567-reward").mkdir()
    (run / ".old-transformer").mkdir()  # as they were called before
    go(tmp_path, Line())
    assert not [path.name for path in run.rglob(".*")]
    assert (run / "reward").is_dir() and (run / "transformer").is_dir()


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (done.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(files.os, "replace", lambda *names: (done.append("rename"), replace(*names))[1])
    with files.atomic_write(tmp_path / "results.json") as temporary:
        temporary.write_text("{}")
    assert done == ["flush", "rename"]
    monkeypatch.undo()
    refused = pytest.raises(PrflError, match="cannot be written")
    with refused, files.atomic_write(tmp_path / "results.json") as temporary:
        temporary.mkdir()
    assert (tmp_path / "results.json").read_text() == "{}"
