"""Cached latents in memory, and the batches that training takes from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Ask, Backbone, Condition
from prfl.backbone.condition import as_asks
from prfl.data.buckets import Clip, ClipSizes, once
from prfl.data.cache import LatentCache
from prfl.data.conditions import asks_of
from prfl.data.manifest import LabelledVideo, PreferencePair, manifest_videos, read_manifest
from prfl.utils.errors import PrflError
from prfl.utils.formats import Window
from prfl.utils.hashing import json_hash, remembered_hash
from prfl.utils.video_size import VideoSize

_PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class LatentBatch:
    """Clean latents with their prompts.  labels: for each dimension, one value in [0, 1] per sample, or nan."""

    latents: Float[Tensor, "b c t h w"]
    condition: Condition
    prompts: list[str]
    labels: dict[str, Float[Tensor, " b"]]


class ClipLatents:
    """Latents of several shapes.  Only latents of the same shape can be indexed together, as a batch.

    kinds: (n,) for each clip, the number of its shape.
    """

    def __init__(self, clips: Sequence[Tensor]) -> None:
        self.clips = list(clips)
        shapes = list(dict.fromkeys(clip.shape for clip in clips))
        self.kinds = torch.tensor([shapes.index(clip.shape) for clip in clips])

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, rows: Tensor | Sequence[int]) -> Float[Tensor, "b c t h w"]:
        return torch.stack([self.clips[int(row)] for row in rows])


@dataclass(kw_only=True)
class _Loaded:
    """The common part of both data sets: each video's latents once, each prompt's condition once, on the CPU.

    fingerprint: hash of the rows and of their videos' contents.  entries: the file names of the videos' latents in the
    cache.  batch: the number of samples in an optimizer step; where clips have several shapes, all samples of a step
    have the same.  first_frames: for each row of ``latents``, the first picture and the clip's size; empty where the
    model takes no first frame.
    """

    latents: Tensor | ClipLatents
    conditions: Mapping[str, Condition]
    prompts: list[str]
    device: torch.device
    skipped: list[tuple[Path, str]]
    fingerprint: str = ""  # hash of the videos' bytes, prompts and labels
    former_fingerprint: str = ""  # what checkpoints of older versions store: a hash of the cache's file names
    entries: frozenset[str] = frozenset()
    batch: int = 1
    first_frames: Sequence[tuple[Path, VideoSize]] = ()

    def kinds(self, rows: Tensor) -> list[int]:
        """Return the number of each row's latent shape; empty where all latents have the same shape."""
        return self.latents.kinds[rows].tolist() if isinstance(self.latents, ClipLatents) else []

    def __len__(self) -> int:
        return len(self.prompts)

    def condition(self, prompts: Sequence[str], rows: Sequence[int]) -> Condition:
        """Look up the conditions of prompts, as one batch on the device.  rows: each prompt's row of ``latents``."""
        asks: Sequence[Ask] = as_asks(prompts)
        if self.first_frames:
            asks = [Ask(prompt, *self.first_frames[row]) for prompt, row in zip(prompts, rows, strict=True)]
        return Condition.cat([self.conditions[ask] for ask in asks]).to(device=self.device)

    def unconditional(self, condition: Condition) -> Condition:
        """Look up the unconditional counterpart of ``condition``, for guidance and prompt dropout, on the device."""
        return Condition.cat([self.conditions[ask.unconditional] for ask in condition.asks]).to(device=self.device)


@dataclass(kw_only=True)
class LatentDataset(_Loaded):
    """Labelled videos of a manifest.  Batches are on the backbone's device.

    video: (n,) for each sample, its row of ``latents``; one video may be labelled for several prompts.
    labels: for each dimension (n,) values in [0, 1], nan where missing.
    """

    video: Tensor
    labels: dict[str, Tensor]

    def get(self, indices: Sequence[int]) -> LatentBatch:
        """Return the samples of these numbers as a batch."""
        chosen = list(indices)
        prompts = [self.prompts[index] for index in chosen]
        labels = {name: values[chosen].to(self.device) for name, values in self.labels.items()}
        rows = self.video[chosen]
        condition = self.condition(prompts, rows.tolist())
        return LatentBatch(self.latents[rows].to(self.device), condition, prompts, labels)


@dataclass(kw_only=True)
class PairDataset(_Loaded):
    """Preference pairs of a manifest.

    a, b: (n,) for each pair, its two rows of ``latents``.  preference: for each dimension (n,), 1 where a is better, 0
    where b is, 0.5 for a tie, nan where missing.
    """

    a: Tensor
    b: Tensor
    preference: dict[str, Tensor]


def load_dataset(
    backbone: Backbone,
    manifest: str | Path,
    folder: str | Path,
    size: VideoSize | ClipSizes,
    *,
    batch: int = 1,
    window: Window = "start",
    split: str | None = None,
    root: Path | None = None,
    skip_unreadable: bool = False,
    follow_links: bool = False,
) -> LatentDataset | PairDataset:
    """Load the rows of a manifest with their cached latents and conditions, all into memory.

    size: the size of all clips, or several sizes, of which each clip takes the one that fits it best.  batch: samples
    of an optimizer step.  split: the split to load; None for all rows.  root: the folder that the videos' paths are
    relative to; None for the manifest's own.  skip_unreadable: leave out rows of videos that could not be read when the
    cache was filled, and list these videos in ``skipped``; otherwise they raise.
    Raises PrflError when the split is empty, or when something is not cached for exactly this model, size and rate.
    """
    every = read_manifest(manifest, root=root, follow_links=follow_links)
    rows = [row for row in every if split is None or row.split == split]
    if not rows:
        raise PrflError(f"no row has split {split!r}", where=str(manifest), fix='add "split" to its rows')
    sizes = ClipSizes.of(size)
    caches = {each: LatentCache.for_backbone(backbone, folder, each, window) for each in sizes.sizes}
    clips = sizes.clips(rows)
    entry_of, skipped = _find(caches, once(clips))
    if skipped and not skip_unreadable:
        listed = "".join(f"\n  {path}: {reason}" for path, reason in skipped)
        fix = "mend or remove these files, or leave them out with skip_unreadable"
        raise PrflError(f"{len(skipped)} videos are unreadable{listed}", where=str(manifest), fix=fix)

    # Keep the rows of which every video is in the cache.
    cached = [(row, of_row) for row, of_row in zip(rows, clips, strict=True) if entry_of.keys() >= set(of_row)]
    kept, kept_clips = [row for row, _ in cached], [of_row for _, of_row in cached]
    if not kept:
        raise PrflError("no readable video is left", where=str(manifest), fix="see the reasons that `prfl cache` lists")

    # Load each video's latents once, and the condition of each prompt (with its first frame) once.
    asks = asks_of(kept, sizes, caches, entry_of)
    conditions = {ask: caches[of_size].condition(ask) for of_size, every in asks.items() for ask in every}
    latents_row = {clip: row for row, clip in enumerate(once(kept_clips))}
    entries = {clip: entry_of[clip] for clip in latents_row}
    frames = [(caches[of_clip].frame_file(entry), of_clip) for (_, of_clip), entry in entries.items()]
    tensors = [caches[of_clip].latents(entry) for (_, of_clip), entry in entries.items()]
    common: dict[str, Any] = {
        "latents": torch.stack(tensors) if len({tensor.shape for tensor in tensors}) == 1 else ClipLatents(tensors),
        "batch": batch,
        "conditions": conditions,
        "first_frames": frames if "image" in backbone.facts.takes else (),
        "device": backbone.facts.device,
        "skipped": skipped,
        "fingerprint": _fingerprint(kept, {video: remembered_hash(video) for video, _ in entries}),
        "former_fingerprint": _fingerprint(kept, {video: entry.name for (video, _), entry in entries.items()}),
        "entries": frozenset(entry.name for entry in entries.values()),
    }

    return _of_rows(kept, [[latents_row[clip] for clip in of_row] for of_row in kept_clips], common)


def _find(
    caches: dict[VideoSize, LatentCache], clips: Sequence[Clip]
) -> tuple[dict[Clip, Path], list[tuple[Path, str]]]:
    """Find the cache entries of clips of several sizes, each in its size's cache.

    Returns ({(video, size): its entry}, [(unreadable video, reason)]), as ``LatentCache.find``.
    """
    entries: dict[Clip, Path] = {}
    failed: list[tuple[Path, str]] = []
    for size, cache in caches.items():
        of_size, failed_of_size = cache.find([video for video, each in clips if each == size])
        entries |= {(video, size): entry for video, entry in of_size.items()}
        failed += failed_of_size
    return entries, failed


def labels_only(rows: Sequence[LabelledVideo | PreferencePair]) -> LatentDataset | PairDataset:
    """Make a data set of prompts and labels alone, without latents, for rows whose videos are not encoded yet."""
    latents_row = {video: row for row, video in enumerate(manifest_videos(rows))}
    places = [[latents_row[video] for video in manifest_videos([row])] for row in rows]
    nothing = {"latents": torch.empty(0), "conditions": {}, "device": torch.device("cpu"), "skipped": []}
    return _of_rows(rows, places, nothing)


def _of_rows(
    rows: Sequence[LabelledVideo | PreferencePair], places: Sequence[Sequence[int]], common: dict[str, Any]
) -> LatentDataset | PairDataset:
    """Make the data set of rows, which are all of one kind.

    places: for each row, the positions of its videos' latents.  common: the arguments that both kinds of data set have.
    """
    common = {**common, "prompts": [row.prompt for row in rows]}
    videos = [row for row in rows if isinstance(row, LabelledVideo)]
    if videos:
        video = torch.tensor([row for (row,) in places])
        return LatentDataset(video=video, labels=_columns([row.label for row in videos]), **common)

    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    a, b = torch.tensor(places).unbind(1)
    preference = [{name: _PREFERRED[side] for name, side in pair.preference.items()} for pair in pairs]
    return PairDataset(a=a, b=b, preference=_columns(preference), **common)


def _fingerprint(rows: Sequence[LabelledVideo | PreferencePair], names: dict[Path, str]) -> str:
    """Hash the rows.  names: for each video, a name that changes with its content."""
    facts: list[Any] = []
    for row in rows:
        if isinstance(row, LabelledVideo):
            facts.append([row.prompt, names[row.video], row.label])
        else:
            facts.append([row.prompt, names[row.a], names[row.b], row.preference])
    return json_hash(facts)[:16]


def preference_between(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where a is larger, 0 where b is, 0.5 where they are equal, nan where either is missing."""
    difference = a - b
    return torch.where(difference.isnan(), difference, difference.sign() / 2 + 0.5)  # sign(nan) is 0


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, Tensor]:
    """Make one (n,) float32 tensor per name; nan where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: torch.tensor([row.get(name, math.nan) for row in rows]) for name in names}
