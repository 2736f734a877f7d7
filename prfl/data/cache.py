"""The latent cache: every video through the VAE once, every prompt through the text encoder once.

    folder/latents/KEY.safetensors     "latents" (c, t, h, w), normalised, in the VAE's dtype
    folder/prompts/KEY.safetensors     the tensors of one prompt's Condition, and of its first frame's where it has one
    folder/frames/KEY.png              the first frame of the clip, for a model that takes one
    folder/latents/KEY.unreadable      why a video could not be read, in place of its latents

KEY is a hash of everything that the content depends on.  For latents: the video's bytes, the model's description (with
fingerprints of its weights), the VAE's dtype, and the clip's size, rate and window.  For a prompt: its text, the first
frame's bytes and its clip's size and rate where it has a first frame, the model's description, and the text encoder.
So an outdated entry is never used, and videos may be renamed.  Each entry is written atomically and existing entries
are skipped, so a run that was stopped continues where it was.

When an entry is read, its name is compared with its metadata, and its content with the hash that it carries
(entries.py).  An entry that does not match is renamed to KEY.damaged, with a warning, and made again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prfl.backbone import Ask, Backbone, Condition
from prfl.backbone.condition import TensorSpec, as_asks
from prfl.data.entries import Form, entry_name, put_aside, read_entry, write_entry
from prfl.utils import processes
from prfl.utils.console import console, warn
from prfl.utils.errors import PrflError
from prfl.utils.formats import Window
from prfl.utils.hashing import remembered_hash
from prfl.utils.reading import printable, unreadable
from prfl.utils.video_size import VideoSize


@dataclass(frozen=True)
class LatentCache:
    """The entries of one model, clip size and rate, in a folder.

    size, window: at which size a video is read, and which part of it.  text: the text encoder's identity, the dtype of
    its embeddings, and the number of tokens at which it cuts a prompt.  shape: (c, t, h, w) of a clip's latents.
    condition_specs: the specification of each tensor of a prompt's condition.  takes_image: whether a clip's condition
    includes its first frame.
    """

    folder: Path
    size: VideoSize
    window: Window
    model: dict[str, Any]
    vae_dtype: str
    text: tuple[str, str, int]
    shape: tuple[int, ...]
    condition_specs: Mapping[str, TensorSpec]
    takes_image: bool = False

    @classmethod
    def for_backbone(
        cls, backbone: Backbone, folder: str | Path, size: VideoSize, window: Window = "start"
    ) -> LatentCache:
        """Make the cache of a backbone.  Raises PrflError for a size that the model cannot take."""
        facts, shape = backbone.facts, backbone.latent_shape(size.frames, size.height, size.width)
        return cls(
            Path(folder),
            size,
            window,
            dict(facts.identity),
            str(facts.vae_dtype),
            (facts.text_identity, str(facts.dtype), facts.text_tokens),
            shape,
            facts.condition,
            "image" in facts.takes,
        )

    @property
    def clip(self) -> dict[str, Any]:
        """Describe the part of a video that an entry is made from, as it enters the entry's name."""
        return {**asdict(self.size), "fps": float(self.size.fps), "window": self.window}

    @property
    def videos(self) -> Form:
        facts = {"model": self.model, "VAE dtype": self.vae_dtype, "clip": self.clip}
        return Form("video", facts, self._latents_fault)

    @property
    def prompts(self) -> Form:
        return Form("prompt", {"model": self.model, "text encoder": list(self.text)}, self._condition_fault)

    def latents_file(self, video: Path) -> Path:
        """Name the file of a video's latents.  Raises OSError when the video's bytes cannot be read."""
        return self.latents_entry(video)[0]

    def latents_entry(self, video: Path) -> tuple[Path, str]:
        """Return (the latents' file, the JSON of what it is made from, whose hash is its name).

        Raises OSError when the video's bytes cannot be read.
        """
        from prfl.utils.decoding import picture_hash

        made_from = self.videos.made_from(picture_hash(video))
        return self.folder / "latents" / f"{entry_name(made_from)}.safetensors", made_from

    def prompt_file(self, prompt: str) -> Path:
        """Name the file of a prompt's condition.  Raises PrflError where its first frame's bytes cannot be read."""
        return self.folder / "prompts" / f"{entry_name(self.prompts.made_from(source_of(prompt)))}.safetensors"

    def frame_file(self, entry: Path) -> Path:
        """Name the file of the first frame of a clip.  entry: the file of its latents."""
        return self.folder / "frames" / f"{entry.stem}.png"

    def ask(self, prompt: str, entry: Path) -> Ask:
        """Make the ask of a clip: its prompt, and its first frame if the model takes one.  entry: its latents' file."""
        return Ask(prompt, self.frame_file(entry), self.size) if self.takes_image else Ask(prompt)

    def find(self, videos: Iterable[Path]) -> tuple[dict[Path, Path], list[tuple[Path, str]]]:
        """Find the entries of videos: ({video: its entry}, [(unreadable video, reason)]).

        Raises PrflError when a video was never cached.
        """
        entries, failed, absent = {}, [], []
        for video in videos:
            try:
                file = self.latents_file(video)
            except OSError as error:
                failed.append((video, unreadable(video, error).one_line))
                continue

            marker = file.with_suffix(".unreadable")
            if file.exists():
                entries[video] = file
            elif marker.exists():
                failed.append((video, marker.read_text(encoding="utf-8", errors="replace")))
            else:
                absent.append(video)

        if absent:
            others = len(list((self.folder / "latents").glob("*.safetensors"))) - len(set(entries.values()))
            what = f"{len(absent)} videos are not in the cache for this model, size and rate; the first is {absent[0]}"
            what += f" ({others} entries are of other videos, models, sizes or rates)" if others else ""
            raise PrflError(what, where=str(self.folder), fix="run `prfl cache` with the same config")
        return entries, failed

    def latents(self, file: Path) -> Tensor:
        """Read a video's latents, (c, t, h, w) float32.  Raises PrflError when the entry is damaged."""
        return read_entry(file, self.videos)[0]["latents"].float()

    def condition(self, prompt: str) -> Condition:
        """Read one prompt's condition, length 1.  Raises PrflError when it was never cached, or is damaged."""
        file = self.prompt_file(prompt)
        if not file.exists():
            fix = "run `prfl cache` with the same config"
            raise PrflError(f"the prompt {prompt[:80]!r} is not in the cache", where=str(self.folder), fix=fix)
        tensors, _ = read_entry(file, self.prompts, str(prompt))
        copies = {name: tensor.clone() for name, tensor in tensors.items()}  # else thousands of files stay mapped
        ragged = frozenset(name for name, spec in self.condition_specs.items() if spec.ragged)
        return Condition(copies, as_asks([prompt]), ragged)

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """List, once each, the prompts whose condition is not in the cache.

        Damaged entries are renamed and count as missing.  All processes share the work, so all must call this.
        """
        files = {prompt: self.prompt_file(prompt) for prompt in dict.fromkeys(prompts)}
        absent = self._absent({file: prompt for prompt, file in files.items()})
        return [prompt for prompt, file in files.items() if file in absent]

    def missing_latents(self, files: Iterable[Path]) -> set[Path]:
        """List the files among these entries of videos that are missing or damaged, as ``missing`` does for prompts."""
        return self._absent(dict.fromkeys(files))

    def keep(self, prompt: str, condition: Condition) -> None:
        """Write one prompt's condition, of length 1.  Raises PrflError when it is not finite."""
        tensors = condition.tensors
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            what = f"the text encoder gives embeddings of {prompt[:80]!r} that are not finite"
            raise PrflError(what, where="backbone.dtype", fix="load the model in float32")
        write_entry(
            self.prompt_file(prompt), tensors, self.prompts.made_from(source_of(prompt)), {"prompt": str(prompt)}
        )

    def keep_latents(self, file: Path, made_from: str, video: Path, latents: Tensor) -> None:
        """Write one video's latents.  Raises PrflError when they are not finite."""
        if not latents.isfinite().all():
            what = "the VAE gives latents that are not finite"
            raise PrflError(what, where=str(video), fix="load the VAE in float32")
        notes = {"video": printable(video.name), "clip": json.dumps(self.clip)}
        write_entry(file, {"latents": latents}, made_from, notes)

    def _absent(self, entries: Mapping[Path, str | None]) -> set[Path]:
        """Find the entries that are missing; damaged ones are renamed, with a warning, and count as missing.

        entries: for each file, its prompt; None for a video.
        """
        absent, damaged, unhashed = [], {}, 0
        for file in processes.share(list(entries)):
            prompt = entries[file]
            lacks_frame = prompt is None and self.takes_image and not self.frame_file(file).is_file()
            if not os.path.lexists(file) or lacks_frame:
                absent.append(file)
                continue
            try:
                _, hashed = read_entry(file, self.videos if prompt is None else self.prompts, prompt)
                unhashed += not hashed
            except PrflError as error:
                damaged[file] = error.what

        # All processes have looked before one of them renames a file.
        all_absent: set[Path] = set()
        all_damaged: dict[Path, str] = {}
        all_unhashed = 0
        for rank_absent, rank_damaged, rank_unhashed in processes.gather((absent, damaged, unhashed)):
            all_absent.update(rank_absent)
            all_damaged.update(rank_damaged)
            all_unhashed += rank_unhashed
        if processes.is_main():
            for file in all_damaged:
                put_aside(file)
        processes.wait()

        _report(self.folder, all_damaged, all_unhashed)
        return all_absent | all_damaged.keys()

    def _latents_fault(self, tensors: Mapping[str, Tensor]) -> str:
        """Say what is wrong with the tensors of a video's entry, or ""."""
        if set(tensors) != {"latents"}:
            return f"it holds {_names(tensors)}, not latents"
        latents = tensors["latents"]
        if tuple(latents.shape) != self.shape or str(latents.dtype) != self.vae_dtype:
            return f"its latents are {tuple(latents.shape)} {latents.dtype}, not {self.shape} {self.vae_dtype}"
        return ""

    def _condition_fault(self, tensors: Mapping[str, Tensor]) -> str:
        """Say what is wrong with the tensors of a prompt's entry, or ""."""
        if set(tensors) != set(self.condition_specs):
            return f"it holds {_names(tensors)}, not {', '.join(self.condition_specs)}"
        faults = (_tensor_fault(name, spec, self.shape, tensors) for name, spec in self.condition_specs.items())
        return next(filter(None, faults), "")


def source_of(prompt: str) -> str | list[Any]:
    """Return what identifies an ask: its prompt, or [prompt, hash of its first frame, the frame's clip or None].

    Raises PrflError where the first frame cannot be read.
    """
    (ask,) = as_asks([prompt])
    if ask.image is None:
        return ask.prompt
    try:
        image = remembered_hash(ask.image)
    except OSError as error:
        raise unreadable(ask.image, error, "name a picture that is there") from error
    clip = asdict(ask.clip) | {"fps": float(ask.clip.fps)} if ask.clip else None
    return [ask.prompt, image, clip]


def _tensor_fault(name: str, spec: TensorSpec, state: Sequence[int], tensors: Mapping[str, Tensor]) -> str:
    """Say what is wrong with one tensor of a prompt's condition, or "".  state: (c, t, h, w) of the video's latents."""
    tensor, shape = tensors[name], spec.of_video(state)
    fits = len(tensor.shape) == len(shape) + 1 and tensor.shape[0] == 1
    fits = fits and all(size in (None, has) for size, has in zip(shape, tensor.shape[1:], strict=True))
    if spec.counts is not None:
        fits = fits and tensor.dtype == spec.dtype and 0 <= int(tensor) <= tensors[spec.counts].shape[1]
        return "" if fits else f"its {name} are not those of one prompt"
    if not fits:
        wanted = ", ".join("tokens" if size is None else str(size) for size in shape)
        return f"its {name} are {tuple(tensor.shape)}, not (1, {wanted})"
    return "" if tensor.dtype == spec.dtype else f"its {name} are {tensor.dtype}, not {spec.dtype}"


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(sorted(tensors)) or "nothing"


def _report(folder: Path, damaged: Mapping[Path, str], unhashed: int) -> None:
    """Warn of damaged entries, and print how many are of an earlier version, without a hash of their content."""
    if damaged:
        shown = "; ".join(f"{file.parent.name}/{file.name} {fault}" for file, fault in list(damaged.items())[:3])
        more = f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        what = f"{len(damaged)} entries do not hold, are now called *.damaged and are encoded again"
        warn(f"{folder}: {what}: {shown}{more}")
    if unhashed:
        console.say(
            f"{folder}: {unhashed} entries are of an earlier version and carry no hash of their content: they are "
            "taken by what they say of themselves; delete them to have them encoded again"
        )
