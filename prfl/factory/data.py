"""The cache of a config's clips and prompts, and the datasets that are read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

from prfl.backbone import Backbone
from prfl.backbone.network import on_host
from prfl.config.schema import Config
from prfl.config.sections.data import DataConfig
from prfl.data import leaks
from prfl.data.cache import LatentCache
from prfl.data.conditions import recall
from prfl.data.dataset import LatentDataset, PairDataset, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.manifest import manifest_videos, read_manifest
from prfl.factory.clips import build_manifest
from prfl.factory.prompts import load_prompts
from prfl.utils import processes
from prfl.utils.console import console
from prfl.utils.errors import PrflError, error_location
from prfl.utils.video_size import VideoSize

Dataset = LatentDataset | PairDataset


def video_size(data: DataConfig) -> VideoSize:
    """Of every clip of the run."""
    return VideoSize(data.frames, data.height, data.width, data.fps)


def fill_cache(config: Config, model: Backbone, progress: Callable) -> Path:
    """Encode what is not yet encoded; returns the manifest."""
    with processes.main_first():
        path = build_manifest(config, model, progress)
    encode_manifest(config, model, path)
    return path


def encode_manifest(config: Config, model: Backbone, path: Path) -> None:
    """The clips and prompts of a manifest, into the config's cache; several processes share them out."""
    data = config.data
    with error_location("data"):
        report = build_cache(
            model,
            path,
            data.cache,
            video_size(data),
            skip_unreadable=data.skip_unreadable,
            follow_links=data.follow_links,
            batch_size=data.encode_batch,
        )
    if processes.is_main():
        from prfl.data.decoding import BY_SIZE, read_anew

        console.say(str(report))
        videos = manifest_videos(read_manifest(path, follow_links=data.follow_links))
        guessed = sum(BY_SIZE in read_anew(video) for video in videos if video.is_file())
        if guessed:
            how = "they are read as BT.709, as players do"
            console.say(f"{guessed} videos have 720 lines or more and no colour tags: {how}")


def encode_prompts(config: Config, model: Backbone, prompts: Iterable[str], progress: Callable) -> int:
    """``remember`` by way of the config's cache: prompts that are in it need no text encoder, and those that are
    not are encoded once, by all processes together.  Returns how many that were."""
    data, wanted = config.data, list(dict.fromkeys(["", *prompts]))
    with error_location("data"):
        stored = LatentCache.for_backbone(model, data.cache, video_size(data))
    missing = stored.missing(wanted)
    mine = processes.share(missing)
    with on_host(model) if mine else nullcontext():
        for prompt in progress(mine) if mine else ():  # one by one, as ``remember`` does
            stored.keep(prompt, model.condition([prompt]))
        model.text.free()
    processes.wait()
    recall(model, {prompt: stored.condition(prompt) for prompt in wanted})
    return len(missing)


def build_dataset(config: Config, model: Backbone, path: Path, split: str) -> Dataset | None:
    """The cached clips of a split, None where there are none.  A manifest whose rows name no split is all for training.

    Raises PrflError for a training row whose prompt is held out (``data.prompts``).
    """
    rows = read_manifest(path, follow_links=config.data.follow_links)
    has_splits = any(row.split for row in rows)
    if split != "train" and not any(row.split == split for row in rows):
        return None
    if split == "train":
        held: dict[str, str] = {}  # prompt: its split
        for name, prompts in load_prompts(config.data.prompts).items():
            if name != "train":
                held |= dict.fromkeys(prompts, name)
        trained = [row.prompt for row in rows if row.split in (None, "train")]
        wrong = [prompt for prompt in trained if prompt in held]
        if wrong:
            raise PrflError(
                f"{len(wrong)} rows for training have a prompt of data.prompts.{held[wrong[0]]}, as {wrong[0][:80]!r}",
                where=str(path),
                fix="give these rows that split, or take their prompts out of the held-out prompts",
            )
        leaks.check_apart({"held out in data.prompts": list(held), "training rows": trained}, str(path), model)
    return cached_dataset(config, model, path, split if has_splits else None)


def cached_dataset(config: Config, model: Backbone, path: Path, split: str | None = None) -> Dataset:
    """The rows of a split, or (None) all of them, with their cached clips."""
    return load_dataset(
        model,
        path,
        config.data.cache,
        video_size(config.data),
        split=split,
        skip_unreadable=config.data.skip_unreadable,
        follow_links=config.data.follow_links,
    )
