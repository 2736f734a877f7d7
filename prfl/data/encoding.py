"""Fill the latent cache: encode the videos and prompts of a manifest.

Videos and prompts that are in the cache are left alone.  All processes of a run share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from prfl.backbone import Backbone
from prfl.data.buckets import Clip, ClipSizes, once
from prfl.data.cache import LatentCache
from prfl.data.conditions import asks_of
from prfl.data.leaks import check_contents, check_prompts
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.utils import processes
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.formats import Window
from prfl.utils.pictures import write_picture
from prfl.utils.reading import unreadable
from prfl.utils.video_size import VideoSize


@dataclass(frozen=True)
class CacheReport:
    """Counts of the videos that were encoded and reused, the unreadable videos with reasons, and prompts embedded."""

    encoded: int
    reused: int
    failed: tuple[tuple[Path, str], ...]
    prompts: int

    def __str__(self) -> str:
        head = f"{self.encoded} videos encoded, {self.reused} found in the cache, {len(self.failed)} unreadable"
        return "\n".join([head, *(f"  {path}: {reason}" for path, reason in self.failed)])


def build_cache(
    backbone: Backbone,
    manifest: str | Path,
    folder: str | Path,
    size: VideoSize | ClipSizes,
    *,
    window: Window = "start",
    batch_size: int = 8,
    root: Path | None = None,
    skip_unreadable: bool = False,
    follow_links: bool = False,
    progress: bool = True,
) -> CacheReport:
    """Encode the videos and prompts of a manifest, and the unconditional prompts; existing entries are left alone.

    All readable videos are encoded first.  Then the unreadable ones are listed with their reasons: they are raised as
    one PrflError or, with ``skip_unreadable``, returned in the report.  Several processes share the work, and each
    returns the whole report.
    root: the folder that the videos' paths are relative to; None for the manifest's own.  size: the size of all clips,
    or several sizes, of which each clip takes the one that fits it best.
    """
    rows = read_manifest(manifest, root=root, follow_links=follow_links)
    sizes = ClipSizes.of(size)
    caches = {each: LatentCache.for_backbone(backbone, folder, each, window) for each in sizes.sizes}
    progress = progress and processes.is_main()

    # Group the videos by their entry: videos of equal content and size share one.
    failed: list[tuple[Path, str]] = []
    same_content: dict[VideoSize, dict[Path, list[Path]]] = {}
    made_from: dict[Path, str] = {}
    entry_of: dict[Clip, Path] = {}
    videos = once(sizes.clips(rows))
    for video, of_video in videos:
        try:
            file, facts = caches[of_video].latents_entry(video)
        except OSError as error:
            failed.append((video, unreadable(video, error).one_line))
            continue
        same_content.setdefault(of_video, {}).setdefault(file, []).append(video)
        made_from[file] = facts
        entry_of[video, of_video] = file

    unread = {video for video, _ in failed}
    _check_splits(rows, [video for video, _ in videos if video not in unread], str(manifest), backbone)

    # Encode one video for each missing entry.
    encoded = 0
    for of_videos, files in same_content.items():
        missing = caches[of_videos].missing_latents(files)
        todo = {file: copies for file, copies in files.items() if file in missing}
        entries = [(file, made_from[file], copies[0]) for file, copies in todo.items()]
        copies_of = {copies[0]: copies for copies in todo.values()}
        for video, reason in _encode_shared(backbone, caches[of_videos], entries, batch_size, progress):
            failed += [(copy, reason) for copy in copies_of[video]]
        encoded += sum(file.exists() for file in todo)

    # Embed the missing prompts, with their first frames.
    embedded, unread = 0, {video for video, _ in failed}
    readable = {clip: entry for clip, entry in entry_of.items() if clip[0] not in unread}
    for of_asks, asks in asks_of(rows, sizes, caches, readable).items():
        unembedded = caches[of_asks].missing(asks)
        _embed_shared(backbone, caches[of_asks], unembedded, progress)
        embedded += len(unembedded)
    processes.wait()

    report = CacheReport(encoded, len(videos) - len(failed) - encoded, tuple(failed), embedded)
    if failed and not skip_unreadable:
        fix = "mend or remove these files, or leave them out with skip_unreadable; the others are cached"
        raise PrflError(str(report), where=str(manifest), fix=fix)
    return report


def _check_splits(
    rows: Sequence[LabelledVideo | PreferencePair], videos: Sequence[Path], where: str, backbone: Backbone
) -> None:
    """Check that no video and no prompt is in two splits.  videos: those whose bytes can be read."""
    from prfl.utils.decoding import picture_hash

    check_contents(rows, {video: picture_hash(video) for video in videos}, where)

    prompts: dict[str, list[str]] = {}
    for row in rows:
        prompts.setdefault(row.split or "no split", []).append(row.prompt)
    check_prompts(prompts, where, backbone)


def _encode_shared(
    backbone: Backbone,
    cache: LatentCache,
    entries: Sequence[tuple[Path, str, Path]],
    batch_size: int,
    progress: bool,
) -> list[tuple[Path, str]]:
    """Encode the entries, one batch per process at a time; returns the videos that any process could not read."""
    failed: list[tuple[Path, str]] = []
    together = batch_size * processes.count()
    with _progress("videos", len(entries), progress) as advance:
        for start in range(0, len(entries), together):
            batch = entries[start : start + together]
            for failures in processes.gather(_encode_videos(backbone, cache, processes.share(batch))):
                failed += failures
            advance(len(batch))
    return failed


def _embed_shared(backbone: Backbone, cache: LatentCache, prompts: Sequence[str], progress: bool) -> None:
    """Embed this process's part of the prompts, one by one, so that no result depends on the other prompts."""
    part = processes.share(prompts)
    with _progress("prompts", len(part), progress) as advance:
        for prompt in part:
            cache.keep(prompt, backbone.condition([prompt]))
            advance(1)


def _encode_videos(
    backbone: Backbone, cache: LatentCache, entries: Sequence[tuple[Path, str, Path]]
) -> list[tuple[Path, str]]:
    """Encode a batch of (file in the cache, what it is made from, video); returns unreadable videos with reasons."""
    from prfl.data.video import read_video

    failed = []
    clips: dict[Path, Tensor] = {}
    sources = {file: (made_from, video) for file, made_from, video in entries}
    for file, (_, video) in sources.items():
        try:
            clips[file] = read_video(video, cache.size, window=cache.window)
            if cache.takes_image:
                write_picture(cache.frame_file(file), clips[file][:, 0])
        except PrflError as error:
            failed.append((video, error.one_line))
            with atomic_write(file.with_suffix(".unreadable")) as temporary:
                temporary.write_text(error.one_line, encoding="utf-8")

    if clips:
        with torch.no_grad():
            latents = backbone.encode(torch.stack(list(clips.values())).to(backbone.facts.device)).cpu()
        for file, tensor in zip(clips, latents, strict=True):
            cache.keep_latents(file, *sources[file], tensor)
            file.with_suffix(".unreadable").unlink(missing_ok=True)
    return failed


@contextmanager
def _progress(kind: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the progress: as a bar on a terminal, elsewhere as one line for every tenth of the work."""
    if not shown or total == 0:
        yield lambda count: None
    elif sys.stdout.isatty():
        columns = (TextColumn(f"caching {kind}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(kind, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if done * 10 // total > before * 10 // total:
                print(f"caching {kind}: {done} of {total}", flush=True)

        yield advance
