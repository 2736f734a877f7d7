"""The trackers of a run, several at once: numbers, the config and the samples' videos, through accelerate's classes.

None ends a run.  One that fails is reported once, begun anew later, more and more seldom, and stands in no other's way.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from prfl.data.video import write_video
from prfl.training.run_folder import RunFolder
from prfl.utils.decoding import rgb_levels
from prfl.utils.files import atomic_write, whole_json

PROJECT = "prfl"  # what services put runs together under; their own variables go before it


@dataclass(frozen=True)
class Video:
    """A sample.  name: of its file, which is the same in every round."""

    name: str
    path: Path
    prompt: str


@dataclass(frozen=True)
class Service:
    """How accelerate's class for a tracker is used.

    arguments: its positional and named ones for a run folder and the id of a run to go on with.  run_id: that id, of a
    tracker that has one.  send: a video; None where the tracker takes none.  tells_config: whether it is told the
    config.
    """

    arguments: Callable[[Path, str | None], tuple[list[Any], dict[str, Any]]]
    run_id: Callable[[Any], str] | None = None
    send: Callable[[Any, Video, int], None] | None = None
    tells_config: bool = True


def _gif(video: Path) -> tuple[bytes, int, int]:
    """A video as the bytes of a GIF, its height and width: TensorBoard shows no other moving pictures."""
    with av.open(str(video)) as container:
        rate = container.streams.video[0].average_rate
        pictures = np.stack([rgb_levels(frame) for frame in container.decode(video=0)])
    pixels = torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.gif"
        write_video(path, pixels, float(rate or 8))
        return path.read_bytes(), *pictures.shape[1:3]


def _to_tensorboard(tracker: Any, video: Video, step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    content, height, width = _gif(video.path)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    tracker.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=video.name, image=image)]), step)
    tracker.writer.add_text(f"{video.name}/prompt", video.prompt, step)
    tracker.writer.flush()


def _to_wandb(tracker: Any, video: Video, step: int) -> None:
    import wandb

    tracker.run.log({video.name: wandb.Video(str(video.path), caption=video.prompt, format="mp4")}, step=step)


def _to_mlflow(tracker: Any, video: Video, step: int) -> None:
    tracker.log_artifact(str(video.path), artifact_path=f"step-{step:06d}/{Path(video.name).parent}")


def _to_trackio(tracker: Any, video: Video, step: int) -> None:
    import trackio

    tracker.run.log({video.name: trackio.Video(video.path, caption=video.prompt, format="mp4")}, step=step)


SERVICES: dict[str, Service] = {
    "tensorboard": Service(lambda run, _: (["trackers", run], {}), send=_to_tensorboard, tells_config=False),
    "wandb": Service(
        lambda run, run_id: (
            [os.environ.get("WANDB_PROJECT", PROJECT)],
            {"name": run.name, "id": run_id, "resume": "allow", "dir": str(run / "trackers")},
        ),
        run_id=lambda tracker: str(tracker.run.id),
        send=_to_wandb,
    ),
    "mlflow": Service(
        lambda run, run_id: ([PROJECT], {"run_name": run.name, "run_id": run_id}),
        run_id=lambda tracker: str(tracker.active_run.info.run_id),
        send=_to_mlflow,
    ),
    "trackio": Service(
        lambda run, _: ([PROJECT], {"name": run.name, "resume": "allow", "embed": False}), send=_to_trackio
    ),
    "comet_ml": Service(lambda run, _: ([os.environ.get("COMET_PROJECT_NAME", PROJECT)], {})),
    "aim": Service(lambda run, _: ([run.name, str(run / "trackers")], {})),
    "clearml": Service(lambda run, _: ([PROJECT], {"task_name": os.environ.get("CLEARML_TASK", run.name)})),
    "dvclive": Service(lambda run, _: ([], {"dir": str(run / "trackers" / "dvclive")})),
    "swanlab": Service(lambda run, _: ([PROJECT], {"experiment_name": run.name})),
}
"""By accelerate's name: everything that it has."""


@dataclass
class Tracked:
    """A tracker of one run.  tracker: None where it has not begun, or failed.  in_vain: calls since it last worked."""

    name: str
    run: RunFolder
    tracker: GeneralTracker | None = None
    in_vain: int = 0

    @property
    def service(self) -> Service:
        return SERVICES[self.name]

    @property
    def id_file(self) -> Path:
        """The file with the id of the tracker's run, so that a resumed run goes on in it; a new start does not."""
        return self.run.path / "trackers" / f"{self.name}.id"

    def worth_a_try(self) -> bool:
        """Whether the tracker works, or is to be started again: it is tried after 1, 2, 4, 8 ... failed calls."""
        return self.tracker is not None or not self.in_vain & (self.in_vain - 1)

    def begin(self) -> None:
        """Make the tracker.  Raises whatever it may raise."""
        if self.tracker is not None:
            return
        self.id_file.parent.mkdir(parents=True, exist_ok=True)
        run_id = self.id_file.read_text(encoding="utf-8") if self.id_file.is_file() else None
        positional, named = self.service.arguments(self.run.path.resolve(), run_id)
        tracker = LOGGER_TYPE_TO_CLASS[self.name](*positional, **named)
        try:
            tracker.start()
        except Exception:
            self.id_file.unlink(missing_ok=True)  # it may be of another account: the next try begins a new run
            raise
        if self.service.tells_config and run_id is None and self.run.resolved_config:
            tracker.store_init_configuration(flat(yaml.safe_load(self.run.resolved_config)))
        if self.service.run_id and run_id is None:
            with atomic_write(self.id_file) as temporary:
                temporary.write_text(self.service.run_id(tracker), encoding="utf-8")
        self.tracker = tracker

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        assert self.tracker is not None
        allowed = {_allowed(name) if self.name == "mlflow" else name: value for name, value in numbers.items()}
        self.tracker.log(allowed, step=step)


@dataclass
class Trackers:
    """All of a run's; on the main process alone.  warn: says what fails."""

    names: Sequence[str]
    run: RunFolder
    warn: Callable[[str], None]
    each: list[Tracked] = field(default_factory=list)
    sent: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.each = [Tracked(name, self.run) for name in self.names]

    def begin(self) -> None:
        self._with_each(lambda tracked: None)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._with_each(lambda tracked: tracked.log(numbers, step))

    def show_samples(self, step: int) -> None:
        """Send the videos that a round after this step, or the end, has written, each once."""
        videos = [video for video in sample_videos(self.run, step) if video.path not in self.sent]
        self.sent.update(video.path for video in videos)

        def send(tracked: Tracked) -> None:
            for video in videos if tracked.service.send else ():
                assert tracked.service.send is not None
                tracked.service.send(tracked.tracker, video, step)

        if videos:
            self._with_each(send)

    def finish(self) -> None:
        for tracked in self.each:
            with suppress(Exception):
                if tracked.tracker is not None:
                    tracked.tracker.finish()
            tracked.tracker = None

    def _with_each(self, do: Callable[[Tracked], None]) -> None:
        for tracked in self.each:
            if not tracked.worth_a_try():
                tracked.in_vain += 1
                continue
            try:
                tracked.begin()
                do(tracked)
                tracked.in_vain = 0
            except (Exception, SystemExit) as error:  # whatever a tracker may raise
                tracked.tracker = None
                tracked.in_vain += 1
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                what = f"the tracker {tracked.name} fails ({reason})"
                self.warn(f"{what}; the run goes on, and {self.run.metrics.name} has every number")


def sample_videos(run: RunFolder, step: int) -> Iterator[Video]:
    """List the videos in the run folder of the round after a step, and of the end, with their prompts."""
    for folder, name in ((run.samples / f"step-{step:06d}", "samples"), (run.samples / "final", "final")):
        results = whole_json(folder / "results.json", "videos", "rows") or {"videos": []}
        for video in results["videos"]:
            prompt = str(results["rows"][video["row"]]["prompt"])
            for file in video["files"].values():
                yield Video(f"{name}/{Path(file).stem}", folder / file, prompt)


def flat(keys: Any, prefix: str = "") -> dict[str, Any]:
    """{yaml path: value} of a config; what is no number, text or truth is written as text."""
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value if isinstance(value, int | float | str) else json.dumps(value)
    return values


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes; dimensions have any."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)
