"""The cache of a config's clips and prompts, and the datasets that are read from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from prfl.backbone import Backbone
from prfl.backbone.condition import texts, with_unconditional
from prfl.backbone.network import on_host
from prfl.config.schema import Config
from prfl.config.sections.data import DataConfig
from prfl.data import leaks
from prfl.data.buckets import ClipSizes
from prfl.data.cache import LatentCache
from prfl.data.conditions import recall
from prfl.data.dataset import LatentDataset, PairDataset, labels_only, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.examples import examples
from prfl.data.manifest import manifest_videos, read_manifest
from prfl.factory.clips import build_manifest
from prfl.factory.prompts import load_prompts
from prfl.utils import processes
from prfl.utils.console import console
from prfl.utils.errors import PrflError, error_location
from prfl.utils.video_size import VideoSize

Dataset = LatentDataset | PairDataset


def video_size(data: DataConfig) -> VideoSize:
    """The size of every video that the run draws, and of its clips if they have one size."""
    return data.sizes[0]


def clip_sizes(config: Config) -> ClipSizes:
    """The sizes at which the run's clips are read; what a reward compares is read at one."""
    return ClipSizes(config.data.sizes, by_prompt=config.trains_reward)


def fill_cache(config: Config, model: Backbone, progress: Callable) -> Path:
    """Encode what is not yet encoded; returns the manifest.  Raises PrflError for rows that the config cannot use."""
    with processes.main_first():
        path = build_manifest(config, model, progress)
    check_rows(config, model, path)
    encode_manifest(config, model, path, config.data.videos_root)
    return path


def check_rows(config: Config, model: Backbone, path: Path) -> None:
    """Raise PrflError, before anything is encoded, for a manifest that the config's training would refuse.

    For a row whose prompt is held out, labels that teach a reward nothing, pairs where videos are trained on.
    """
    rows = read_manifest(path, root=config.data.videos_root, follow_links=config.data.follow_links)
    trained = [row for row in rows if row.split in (None, "train")]
    if not trained:
        fix = 'give some rows "split": "train", or no row a split'
        raise PrflError("no row is for training", where=str(path), fix=fix)
    check_held_out(config, model, [row.prompt for row in trained], path)

    labels = labels_only(trained)
    if config.preference and config.reward:
        with error_location(config.data.clips_key):
            examples(labels, config.preference.loss, config.reward.head_dimensions)
    elif isinstance(labels, PairDataset):
        what = f"objective {config.objective.name} trains on videos, not on pairs"
        raise PrflError(what, where=config.data.clips_key, fix="give a manifest of videos, or data.folder")


def encode_manifest(config: Config, model: Backbone, path: Path, root: Path | None = None) -> None:
    """The clips and prompts of a manifest, into the config's cache; several processes share them out.

    root: the folder of its videos; None is its own.
    """
    data = config.data
    with error_location("data"):
        report = build_cache(
            model,
            path,
            data.cache,
            clip_sizes(config),
            root=root,
            skip_unreadable=data.skip_unreadable,
            follow_links=data.follow_links,
            batch_size=data.encode_batch,
        )
    if processes.is_main():
        from prfl.utils.decoding import BY_SIZE, read_anew

        console.say(str(report))
        videos = manifest_videos(read_manifest(path, root=root, follow_links=data.follow_links))
        guessed = sum(BY_SIZE in read_anew(video) for video in videos if video.is_file())
        if guessed:
            how = "they are read as BT.709, as players do"
            console.say(f"{guessed} videos have 720 lines or more and no colour tags: {how}")


def encode_prompts(config: Config, model: Backbone, prompts: Iterable[str], progress: Callable) -> int:
    """``remember`` by way of the config's cache: prompts that are in it need no text encoder, and those that are
    not are encoded once, by all processes together.  Returns how many that were."""
    data, wanted = config.data, with_unconditional(prompts)
    with error_location("data"):
        stored = LatentCache.for_backbone(model, data.cache, video_size(data))
    missing = stored.missing(wanted)
    mine = processes.share(missing)
    with on_host(model) if mine else nullcontext():
        for prompt in progress(mine) if mine else ():  # one by one, as ``remember`` does
            stored.keep(prompt, model.condition([prompt]))
        model.text.free()
    processes.wait()
    recall(model, {ask: stored.condition(ask) for ask in wanted})
    return len(missing)


def build_dataset(config: Config, model: Backbone, path: Path, split: str) -> Dataset | None:
    """The cached clips of a split, None where there are none.  Rows of a manifest without any split are all trained."""
    rows = read_manifest(path, root=config.data.videos_root, follow_links=config.data.follow_links)
    has_splits = any(row.split for row in rows)
    if split != "train" and not any(row.split == split for row in rows):
        return None
    return cached_dataset(config, model, path, split if has_splits else None, config.data.videos_root)


def check_held_out(config: Config, model: Backbone, trained: Sequence[str], path: Path) -> None:
    """Raise PrflError for prompts of training rows that are held out (``data.prompts``)."""
    held: dict[str, str] = {}  # prompt: its split
    for name, prompts in load_prompts(config.data).items():
        if name != "train":
            held |= dict.fromkeys(texts(prompts), name)
    wrong = [prompt for prompt in trained if prompt in held]
    if wrong:
        raise PrflError(
            f"{len(wrong)} rows for training have a prompt of data.prompts.{held[wrong[0]]}, as {wrong[0][:80]!r}",
            where=str(path),
            fix="give these rows that split, or take their prompts out of the held-out prompts",
        )
    leaks.check_apart({"held out in data.prompts": list(held), "training rows": trained}, str(path), model)


def cached_dataset(
    config: Config, model: Backbone, path: Path, split: str | None = None, root: Path | None = None
) -> Dataset:
    """The rows of a split, or (None) all of them, with their cached clips.  root: as in ``encode_manifest``."""
    return load_dataset(
        model,
        path,
        config.data.cache,
        clip_sizes(config),
        batch=config.training.batch,
        split=split,
        root=root,
        skip_unreadable=config.data.skip_unreadable,
        follow_links=config.data.follow_links,
    )
