"""The latent cache: every video through the VAE once, every prompt through the text encoder once.

    folder/latents/KEY.safetensors     "latents" (c, t, h, w), normalised, in the VAE's dtype
    folder/prompts/KEY.safetensors     the tensors of one prompt's Condition
    folder/latents/KEY.unreadable      why a video could not be read, in place of its latents

KEY is a hash of everything that the content depends on: the file's bytes (or the prompt), the model's description (with
fingerprints of its weights) and dtype, and the clip's size, rate and window.  So a stale entry cannot be found, files
may be renamed, and a run that was stopped goes on where it was: each entry is written atomically, and present ones are
skipped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prfl import processes
from prfl.backbone import Condition, WanBackbone
from prfl.backbone.wan import TEXT_TOKENS
from prfl.data.files import content_hash, read_tensors, replacing
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.video import Window, read_video
from prfl.errors import PrflError


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

    clip: the keyword arguments of ``read_video``.  text: identity of the text encoder, the dtype of its embeddings, and
    where it cuts a prompt, in tokens.
    """

    folder: Path
    clip: dict[str, Any]
    model: dict[str, Any]
    vae_dtype: str
    text: tuple[str, str, int]

    @classmethod
    def of(
        cls,
        backbone: WanBackbone,
        folder: str | Path,
        *,
        frames: int,
        height: int,
        width: int,
        fps: int | float,
        window: Window = "start",
    ) -> LatentCache:
        backbone.latent_shape(frames, height, width)  # a size that the model cannot take is refused before any work
        clip = {"frames": frames, "height": height, "width": width, "fps": float(fps), "window": window}
        return cls(
            Path(folder),
            clip,
            backbone.describe(),
            str(backbone.vae.dtype),
            (backbone.text_identity, str(backbone.dtype), TEXT_TOKENS),
        )

    def latents_file(self, video: Path) -> Path:
        """Raises OSError when the video's bytes cannot be read."""
        key = _key([content_hash(video), self.model, self.vae_dtype, self.clip])
        return self.folder / "latents" / f"{key}.safetensors"

    def prompt_file(self, prompt: str) -> Path:
        return self.folder / "prompts" / f"{_key([prompt, self.model, self.text])}.safetensors"

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
                failed.append((video, marker.read_text(encoding="utf-8")))
            else:
                absent.append(video)
        if absent:
            others = len(list((self.folder / "latents").glob("*.safetensors"))) - len(set(found.values()))
            what = f"{len(absent)} videos are not in the cache for this model, size and rate; the first is {absent[0]}"
            what += f" ({others} entries are of other videos, models, sizes or rates)" if others else ""
            raise PrflError(what, where=str(self.folder), fix="run `prfl cache` with the same config")
        return found, failed

    def latents(self, file: Path) -> Tensor:
        """(c, t, h, w), float32."""
        return self._entry(file)["latents"].float()

    def condition(self, prompt: str) -> Condition:
        """One prompt's condition, length 1.  Raises PrflError when it was never cached."""
        file = self.prompt_file(prompt)
        if not file.exists():
            fix = "run `prfl cache` with the same config"
            raise PrflError(f"the prompt {prompt[:80]!r} is not in the cache", where=str(self.folder), fix=fix)
        return Condition.from_tensors(self._entry(file))

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts whose condition is not here, once each.  A damaged entry counts as missing."""
        return [prompt for prompt in dict.fromkeys(prompts) if not _whole(self.prompt_file(prompt))]

    def keep(self, prompt: str, condition: Condition) -> None:
        """Write one prompt's condition, of length 1.  Raises PrflError when it is not finite."""
        tensors = condition.tensors()
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            what = f"the text encoder gives embeddings of {prompt[:80]!r} that are not finite"
            raise PrflError(what, where="backbone.dtype", fix="load the model in float32")
        _write(self.prompt_file(prompt), tensors, {"prompt": prompt})

    @staticmethod
    def _entry(file: Path) -> dict[str, Tensor]:
        """Raises PrflError for an entry that is damaged or has values that are not finite."""
        fix = f"delete {file.name} and run `prfl cache` again"
        tensors = read_tensors(file, fix)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise PrflError(f"the cached {name} are not finite", where=str(file), fix=fix)
        return tensors


def build_cache(
    backbone: WanBackbone,
    manifest: str | Path,
    folder: str | Path,
    *,
    frames: int,
    height: int,
    width: int,
    fps: int | float,
    window: Window = "start",
    batch_size: int = 8,
    skip_unreadable: bool = False,
    progress: bool = True,
) -> CacheReport:
    """Encodes the videos and prompts of a manifest, and the empty prompt; what is there already is left alone.

    Every readable video is encoded before the unreadable ones are reported, all of them, with their reasons: as
    PrflError, or with ``skip_unreadable`` in the report.  Several processes share the work out; each reports the whole.
    """
    rows = read_manifest(manifest)
    cache = LatentCache.of(backbone, folder, frames=frames, height=height, width=width, fps=fps, window=window)
    failed: list[tuple[Path, str]] = []
    todo: dict[Path, list[Path]] = {}  # entry -> the videos with that content
    videos = manifest_videos(rows)
    progress = progress and processes.is_main()
    for video in videos:
        try:
            file = cache.latents_file(video)
        except OSError as error:
            failed.append((video, str(error.strerror)))
            continue
        if not _whole(file):
            todo.setdefault(file, []).append(video)
    processes.wait()  # all have looked before one writes, so all have the same list
    entries, together = [(file, some[0]) for file, some in todo.items()], batch_size * processes.count()
    with _progress("videos", len(entries), progress) as advance:
        for start in range(0, len(entries), together):
            some = entries[start : start + together]
            failed += sum(processes.gather(_encode_videos(backbone, cache, processes.share(some))), [])
            advance(len(some))
    prompts = cache.missing(["", *(row.prompt for row in rows)])
    mine = processes.share(prompts)
    processes.wait()
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
    backbone: WanBackbone, cache: LatentCache, entries: Sequence[tuple[Path, Path]]
) -> list[tuple[Path, str]]:
    """One batch of (file in the cache, video); returns the unreadable videos, with their reasons."""
    failed = []
    clips: dict[Path, Tensor] = {}
    for file, video in entries:
        try:
            clips[file] = read_video(video, **cache.clip)
        except PrflError as error:
            failed.append((video, error.what))
            with replacing(file.with_suffix(".unreadable")) as temporary:
                temporary.write_text(error.what, encoding="utf-8")
    if clips:
        with torch.no_grad():
            latents = backbone.encode(torch.stack(list(clips.values())).to(backbone.device)).cpu()
        for file, tensor in zip(clips, latents, strict=True):
            video = dict(entries)[file]
            if not tensor.isfinite().all():
                what = "the VAE gives latents that are not finite"
                raise PrflError(what, where=str(video), fix="load the VAE in float32")
            _write(file, {"latents": tensor}, {"video": video.name, "clip": json.dumps(cache.clip)})
            file.with_suffix(".unreadable").unlink(missing_ok=True)
    return failed


def _key(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata)
    with replacing(file) as temporary:
        temporary.write_bytes(data)


def _whole(file: Path) -> bool:
    """Present, with a header that fits the file's size.  A damaged entry is made again."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, FileNotFoundError):
        return False


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
