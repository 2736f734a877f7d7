"""The latent cache: every video through the VAE once, every prompt through the text encoder once.

    folder/latents/KEY.safetensors     "latents" (c, t, h, w), normalised, in the VAE's dtype
    folder/prompts/KEY.safetensors     the tensors of one prompt's Condition
    folder/latents/KEY.unreadable      why a video could not be read, in place of its latents

KEY is a hash of everything that the content depends on: the file's bytes (or the prompt), the model's description (with
fingerprints of its weights) and dtype, and the clip's size, rate and window.  So a stale entry cannot be found, files
may be renamed, and a run that was stopped goes on where it was: each entry is written atomically, and present ones are
skipped.

What a file's name says is compared with its own metadata, and its content with a hash that it carries, when it is read
(entries.py).  One that does not hold is put aside as KEY.damaged, which is said, and made again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from prfl.backbone import Backbone, Condition
from prfl.backbone.wan.model import TEXT_TOKENS
from prfl.data.entries import Form, entry_name, put_aside, read_entry, write_entry
from prfl.data.formats import Window
from prfl.data.leaks import check_contents, check_prompts
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.video_size import VideoSize
from prfl.utils import processes
from prfl.utils.console import console, warn
from prfl.utils.errors import PrflError
from prfl.utils.files import printable, replacing


@dataclass(frozen=True)
class CacheReport:
    """Videos encoded now, found again, and unreadable (with the reason); prompts embedded now."""

    encoded: int
    reused: int
    failed: tuple[tuple[Path, str], ...]
    prompts: int

    def __str__(self) -> str:
        head = f"{self.encoded} videos encoded, {self.reused} found in the cache, {len(self.failed)} unreadable"
        return "\n".join([head, *(f"  {path}: {reason}" for path, reason in self.failed)])


@dataclass(frozen=True)
class LatentCache:
    """Where the entries of one model, clip size and rate lie.

    size, window: which part of a video is read, and how large.  text: identity of the text encoder, the dtype of its
    embeddings, and where it cuts a prompt, in tokens.  shape: (c, t, h, w) of a clip's latents.  text_width: of a
    prompt's embeddings.
    """

    folder: Path
    size: VideoSize
    window: Window
    model: dict[str, Any]
    vae_dtype: str
    text: tuple[str, str, int]
    shape: tuple[int, ...]
    text_width: int

    @classmethod
    def of(cls, backbone: Backbone, folder: str | Path, size: VideoSize, window: Window = "start") -> LatentCache:
        shape = backbone.latent_shape(size.frames, size.height, size.width)  # refuses what the model cannot take
        return cls(
            Path(folder),
            size,
            window,
            backbone.describe(),
            str(backbone.vae.dtype),
            (backbone.text_identity, str(backbone.dtype), TEXT_TOKENS),
            shape,
            backbone.text_width,
        )

    @property
    def clip(self) -> dict[str, Any]:
        """What of a video an entry is made from, as the entries' names have it."""
        return {**asdict(self.size), "fps": float(self.size.fps), "window": self.window}

    @property
    def videos(self) -> Form:
        facts = {"model": self.model, "VAE dtype": self.vae_dtype, "clip": self.clip}
        return Form("video", facts, self._latents_fault)

    @property
    def prompts(self) -> Form:
        return Form("prompt", {"model": self.model, "text encoder": list(self.text)}, self._condition_fault)

    def latents_file(self, video: Path) -> Path:
        """Raises OSError when the video's bytes cannot be read."""
        return self.latents_entry(video)[0]

    def latents_entry(self, video: Path) -> tuple[Path, str]:
        """The file, and what it is made from, whose hash is the file's name.  Raises OSError, as ``latents_file``."""
        from prfl.data.decoding import picture_hash

        made_from = self.videos.made_from(picture_hash(video))
        return self.folder / "latents" / f"{entry_name(made_from)}.safetensors", made_from

    def prompt_file(self, prompt: str) -> Path:
        return self.folder / "prompts" / f"{entry_name(self.prompts.made_from(prompt))}.safetensors"

    def find(self, videos: Iterable[Path]) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
        """({video: its entry}, [(unreadable video, reason)]).  Raises PrflError when a video was never cached."""
        found, failed, absent = {}, [], []
        for video in videos:
            try:
                file = self.latents_file(video)
            except OSError as error:
                failed.append((video, str(error.strerror)))
                continue
            marker = file.with_suffix(".unreadable")
            if file.exists():
                found[video] = file
            elif marker.exists():
                failed.append((video, marker.read_text(encoding="utf-8", errors="replace")))
            else:
                absent.append(video)
        if absent:
            others = len(list((self.folder / "latents").glob("*.safetensors"))) - len(set(found.values()))
            what = f"{len(absent)} videos are not in the cache for this model, size and rate; the first is {absent[0]}"
            what += f" ({others} entries are of other videos, models, sizes or rates)" if others else ""
            raise PrflError(what, where=str(self.folder), fix="run `prfl cache` with the same config")
        return found, failed

    def latents(self, file: Path) -> Tensor:
        """(c, t, h, w), float32.  Raises PrflError when the entry is damaged."""
        return read_entry(file, self.videos)[0]["latents"].float()

    def condition(self, prompt: str) -> Condition:
        """One prompt's condition, length 1.  Raises PrflError when it was never cached, or is damaged."""
        file = self.prompt_file(prompt)
        if not file.exists():
            fix = "run `prfl cache` with the same config"
            raise PrflError(f"the prompt {prompt[:80]!r} is not in the cache", where=str(self.folder), fix=fix)
        tensors, _ = read_entry(file, self.prompts, prompt)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}  # else thousands of files stay mapped
        return Condition.from_tensors(copies)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts whose condition is not here, once each; damaged ones are put aside and count as missing.

        All processes look together.
        """
        files = {prompt: self.prompt_file(prompt) for prompt in dict.fromkeys(prompts)}
        absent = self._absent({file: prompt for prompt, file in files.items()})
        return [prompt for prompt, file in files.items() if file in absent]

    def missing_latents(self, files: Iterable[Path]) -> set[Path]:
        """The same for entries of videos."""
        return self._absent(dict.fromkeys(files))

    def keep(self, prompt: str, condition: Condition) -> None:
        """Write one prompt's condition, of length 1.  Raises PrflError when it is not finite."""
        tensors = condition.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            what = f"the text encoder gives embeddings of {prompt[:80]!r} that are not finite"
            raise PrflError(what, where="backbone.dtype", fix="load the model in float32")
        write_entry(self.prompt_file(prompt), tensors, self.prompts.made_from(prompt), {"prompt": prompt})

    def keep_latents(self, file: Path, made_from: str, video: Path, latents: Tensor) -> None:
        """Write one video's latents.  Raises PrflError when they are not finite."""
        if not latents.isfinite().all():
            what = "the VAE gives latents that are not finite"
            raise PrflError(what, where=str(video), fix="load the VAE in float32")
        notes = {"video": printable(video.name), "clip": json.dumps(self.clip)}
        write_entry(file, {"latents": latents}, made_from, notes)

    def _absent(self, entries: Mapping[Path, str | None]) -> set[Path]:
        """Entries that are not here; damaged ones are put aside, and said.  Values: the prompt, or None for videos."""
        absent, damaged, unhashed = [], {}, 0
        for file in processes.share(list(entries)):
            prompt = entries[file]
            if not os.path.lexists(file):
                absent.append(file)
                continue
            try:
                _, hashed = read_entry(file, self.videos if prompt is None else self.prompts, prompt)
                unhashed += not hashed
            except PrflError as error:
                damaged[file] = error.what
        everything = processes.gather((absent, damaged, unhashed))  # all have looked before one writes
        aside = {file: what for _, theirs, _ in everything for file, what in theirs.items()}
        if processes.is_main():
            for file in aside:
                put_aside(file)
        processes.wait()
        _say(self.folder, aside, sum(count for *_, count in everything))
        return {file for theirs, _, _ in everything for file in theirs} | aside.keys()

    def _latents_fault(self, tensors: Mapping[str, Tensor]) -> str:
        if set(tensors) != {"latents"}:
            return f"it holds {_names(tensors)}, not latents"
        latents = tensors["latents"]
        if tuple(latents.shape) != self.shape or str(latents.dtype) != self.vae_dtype:
            return f"its latents are {tuple(latents.shape)} {latents.dtype}, not {self.shape} {self.vae_dtype}"
        return ""

    def _condition_fault(self, tensors: Mapping[str, Tensor]) -> str:
        if set(tensors) != {"prompt_embeds", "lengths"}:
            return f"it holds {_names(tensors)}, not prompt_embeds, lengths"
        embeds, lengths = tensors["prompt_embeds"], tensors["lengths"]
        if embeds.ndim != 3 or (len(embeds), embeds.shape[2]) != (1, self.text_width):
            return f"its prompt_embeds are {tuple(embeds.shape)}, not (1, tokens, {self.text_width})"
        if str(embeds.dtype) != self.text[1]:
            return f"its prompt_embeds are {embeds.dtype}, not {self.text[1]}"
        if lengths.shape != (1,) or lengths.dtype != torch.int64 or not 0 <= int(lengths) <= embeds.shape[1]:
            return "its lengths are not those of one prompt"
        return ""


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(tensors)) or "nothing"


def _say(folder: Path, aside: Mapping[Path, str], unhashed: int) -> None:
    if aside:
        shown = "; ".join(f"{file.parent.name}/{file.name} {what}" for file, what in list(aside.items())[:3])
        more = f"; and {len(aside) - 3} more" if len(aside) > 3 else ""
        what = f"{len(aside)} entries do not hold, are now called *.damaged and are encoded again"
        warn(f"{folder}: {what}: {shown}{more}")
    if unhashed:
        console.print(
            f"{folder}: {unhashed} entries are of an earlier version and carry no hash of their content: they are "
            "taken by what they say of themselves; delete them to have them encoded again",
            markup=False,
            soft_wrap=True,
        )


def build_cache(
    backbone: Backbone,
    manifest: str | Path,
    folder: str | Path,
    size: VideoSize,
    *,
    window: Window = "start",
    batch_size: int = 8,
    skip_unreadable: bool = False,
    follow_links: bool = False,
    progress: bool = True,
) -> CacheReport:
    """Encodes the videos and prompts of a manifest, and the empty prompt; what is there already is left alone.

    Every readable video is encoded before the unreadable ones are reported, all of them, with their reasons: as
    PrflError, or with ``skip_unreadable`` in the report.  Several processes share the work out; each reports the whole.
    """
    rows = read_manifest(manifest, follow_links=follow_links)
    cache = LatentCache.of(backbone, folder, size, window)
    failed: list[tuple[Path, str]] = []
    same_content: dict[Path, list[Path]] = {}  # entry -> the videos with that content
    made_from: dict[Path, str] = {}
    videos = manifest_videos(rows)
    progress = progress and processes.is_main()
    for video in videos:
        try:
            file, facts = cache.latents_entry(video)
        except OSError as error:
            failed.append((video, str(error.strerror)))
            continue
        same_content.setdefault(file, []).append(video)
        made_from[file] = facts
    check_contents(rows, {video: file for file, some in same_content.items() for video in some}, str(manifest))
    splits: dict[str, list[str]] = {}
    for row in rows:
        splits.setdefault(row.split or "no split", []).append(row.prompt)
    check_prompts(splits, str(manifest), backbone)
    missing = cache.missing_latents(same_content)
    todo = {file: some for file, some in same_content.items() if file in missing}
    entries = [(file, made_from[file], some[0]) for file, some in todo.items()]
    together = batch_size * processes.count()
    with _progress("videos", len(entries), progress) as advance:
        for start in range(0, len(entries), together):
            some = entries[start : start + together]
            failed += sum(processes.gather(_encode_videos(backbone, cache, processes.share(some))), [])
            advance(len(some))
    prompts = cache.missing(["", *(row.prompt for row in rows)])
    mine = processes.share(prompts)
    with _progress("prompts", len(mine), progress) as advance:
        for prompt in mine:  # one by one, so that no prompt's bits depend on its neighbours
            cache.keep(prompt, backbone.condition([prompt]))
            advance(1)
    processes.wait()
    same = {some[0]: some for some in todo.values()}
    failed = [(video, reason) for first, reason in failed for video in same.get(first, [first])]
    encoded = sum(file.exists() for file in todo)
    report = CacheReport(encoded, len(videos) - len(failed) - encoded, tuple(failed), len(prompts))
    if failed and not skip_unreadable:
        fix = "mend or remove these files, or leave them out with skip_unreadable; the others are cached"
        raise PrflError(str(report), where=str(manifest), fix=fix)
    return report


def manifest_videos(rows: Sequence[LabelledVideo | PreferencePair]) -> list[Path]:
    """Every video of a manifest once, in order."""
    both = ([row.video] if isinstance(row, LabelledVideo) else [row.a, row.b] for row in rows)
    return list(dict.fromkeys(video for videos in both for video in videos))


def _encode_videos(
    backbone: Backbone, cache: LatentCache, entries: Sequence[tuple[Path, str, Path]]
) -> list[tuple[Path, str]]:
    """One batch of (file in the cache, what it is made from, video); returns the unreadable videos with the reasons."""
    from prfl.data.video import read_video

    failed = []
    clips: dict[Path, Tensor] = {}
    sources = {file: (made_from, video) for file, made_from, video in entries}
    for file, (_, video) in sources.items():
        try:
            clips[file] = read_video(video, cache.size, window=cache.window)
        except PrflError as error:
            failed.append((video, error.what))
            with replacing(file.with_suffix(".unreadable")) as temporary:
                temporary.write_text(error.what, encoding="utf-8")
    if clips:
        with torch.no_grad():
            latents = backbone.encode(torch.stack(list(clips.values())).to(backbone.device)).cpu()
        for file, tensor in zip(clips, latents, strict=True):
            cache.keep_latents(file, *sources[file], tensor)
            file.with_suffix(".unreadable").unlink(missing_ok=True)
    return failed


@contextmanager
def _progress(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere a line at every tenth."""
    if not shown or total == 0:
        yield lambda count: None
    elif sys.stdout.isatty():
        columns = (TextColumn(f"caching {what}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if done * 10 // total > before * 10 // total:
                print(f"caching {what}: {done} of {total}", flush=True)

        yield advance
