"""Several trackers at once, with the samples' videos; one that fails stands in nobody's way."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType

from prfl.config.sections.training import Tracker
from prfl.data.video import write_video
from prfl.training.distributed import make_accelerator
from prfl.training.loop import Hook
from prfl.training.run_folder import RunFolder
from prfl.training.trackers import SERVICES, Service, Trackers, flat
from prfl.utils.errors import PrflError
from tests.training.test_loop import Line, go


def draw(run: RunFolder, step: int) -> None:
    """A round's samples, as policy_eval writes them."""
    folder = run.samples / f"step-{step:06d}"
    levels = torch.linspace(-1, 1, 5)[None, :, None, None].expand(3, 5, 16, 16)
    write_video(folder / "videos/policy-000.mp4", levels, 8)
    content = {"videos": [{"row": 0, "files": {"policy": "videos/policy-000.mp4"}}], "rows": [{"prompt": "a circle"}]}
    (folder / "results.json").write_text(json.dumps(content))


def drawing(folder: Path) -> Hook:
    """A round every three steps."""

    def call(step: int) -> dict[str, float]:
        draw(RunFolder(folder / "run"), step)
        return {"judge/all": 0.5}

    return Hook(3, call)


class Kept(GeneralTracker):
    """Keeps what it is told; fails where it is told to."""

    name, requires_logging_directory = "kept", False
    told: list[tuple[Any, ...]] = []
    failing: set[int] = set()

    def __init__(self, project: str, **settings: Any) -> None:
        super().__init__()
        self.told.append(("made", project, settings))

    def start(self) -> None: ...

    @property
    def tracker(self) -> Kept:
        return self

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(("config", values))

    def log(self, values: dict, step: int | None = None, **more: Any) -> None:
        if step in self.failing:
            raise ConnectionError("no network")
        self.told.append(("log", step, values))

    def finish(self) -> None:
        self.told.append(("finish",))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[Kept]:
    """In the place of wandb, which need not be installed."""
    monkeypatch.setattr(Kept, "told", [])
    monkeypatch.setattr(Kept, "failing", set())
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Kept)
    monkeypatch.setattr(
        "accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB, LoggerType.TENSORBOARD]
    )
    service = Service(
        lambda run, run_id: (["prfl"], {"name": run.name, "id": run_id}),
        run_id=lambda tracker: "seven",
        send=lambda tracker, video, step: tracker.told.append(("video", step, video.name, video.prompt)),
    )
    monkeypatch.setitem(SERVICES, "wandb", service)
    return Kept


def test_every_tracker_of_accelerate_may_be_named() -> None:
    assert set(typing.get_args(Tracker)) == SERVICES.keys() == LOGGER_TYPE_TO_CLASS.keys()


def test_several_at_once_get_numbers_and_videos(tmp_path: Path, kept: type[Kept]) -> None:
    assert go(tmp_path, Line(), hooks=[drawing(tmp_path)], trackers=["wandb", "tensorboard"], log_every=2).step == 6
    events = b"".join(file.read_bytes() for file in (tmp_path / "run/trackers").glob("events*"))
    assert events.count(b"GIF89a") == 2 and b"a circle" in events and b"validation/judge/all" in events
    assert [told[1] for told in kept.told if told[0] == "log"] == [2, 3, 4, 6, 6]
    assert [told[1:] for told in kept.told if told[0] == "video"] == [
        (3, "samples/policy-000", "a circle"), (6, "samples/policy-000", "a circle")
    ]  # fmt: skip
    assert kept.told[0] == ("made", "prfl", {"name": "run", "id": None}) and kept.told[-1] == ("finish",)


def test_one_that_fails_stands_in_nobodys_way(tmp_path: Path, kept: type[Kept], capsys) -> None:
    kept.failing |= {1, 2, 3}
    assert go(tmp_path, Line(), trackers=["wandb", "tensorboard"], log_every=1).step == 6
    said = capsys.readouterr().out
    assert said.count("warning: the tracker wandb fails (no network); the run goes on") == 1
    assert [told[1] for told in kept.told if told[0] == "log"] == [5, 6], "begun anew, after 1, 2, 4 ... calls"
    (events,) = (tmp_path / "run/trackers").glob("events*")
    assert events.stat().st_size > 500, "and tensorboard was never begun anew"


def test_one_that_cannot_begin_or_ends_the_process_does_not_end_the_run(tmp_path, kept, capsys, monkeypatch) -> None:
    def leaves(self: Kept) -> None:
        raise SystemExit("no account")

    monkeypatch.setattr(Kept, "start", leaves)
    assert go(tmp_path, Line(), trackers=["wandb"]).step == 6
    assert "the tracker wandb fails (no account)" in capsys.readouterr().out


def test_a_resumed_run_goes_on_in_the_services_own(tmp_path: Path, kept: type[Kept]) -> None:
    run = RunFolder(tmp_path, resolved_config="training: {steps: 3, betas: [0.9, 0.99]}\nseed: 0\n")
    for _ in range(2):
        Trackers(["wandb"], run, pytest.fail).begin()
    made = [told for told in kept.told if told[0] == "made"]
    assert [told[2]["id"] for told in made] == [None, "seven"]
    config = {"training.steps": 3, "training.betas": "[0.9, 0.99]", "seed": 0}
    assert [told[1] for told in kept.told if told[0] == "config"] == [config]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    with pytest.raises(PrflError, match=r"training.trackers: wandb is not installed\n  To mend it: pip install wandb"):
        make_accelerator(RunFolder(tmp_path), "cpu", ["tensorboard", "wandb"])


def test_a_config_is_flat() -> None:
    assert flat({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "a.c": "null", "d": "x"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_ones_take_numbers_and_videos(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network or an account, where they are installed."""
    for variable, value in {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "run", resolved_config="training: {steps: 3}\n")
    draw(run, 3)
    for step in (3, 4):
        several = Trackers([name], run, pytest.fail)
        several.begin()
        several.log({"loss": 0.5, "reward/a (b)": 1.0}, step)
        several.show_samples(3)
        several.finish()
    theirs = [file for file in tmp_path.rglob("*.mp4") if run.samples not in file.parents]
    assert theirs, "the video lies with the tracker"
