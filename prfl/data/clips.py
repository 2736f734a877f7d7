"""Preference pairs from videos without labels: each clip is paired with synthetic degradations of itself.

The clip as it was cut is always the preferred side.  The kind of degradation gives the pair's dimension: ``look``
(blur, noise, contrast) or ``motion`` (jitter, shuffle, freeze).  Such pairs teach a reward to see damage, not taste:
real preferences are better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prfl.data.manifest import LabelledVideo, PreferencePair, write_manifest
from prfl.data.sources import find_videos, listed
from prfl.data.video import Stretches, cut_video, find_stretches, write_video
from prfl.utils import rng
from prfl.utils.console import console
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

Clip = Float[Tensor, "3 f h w"]
Kind = Literal["blur", "noise", "contrast", "jitter", "shuffle", "freeze"]
Format = Literal["mp4", "webm", "gif"]
DIMENSION: dict[Kind, str] = {
    "blur": "look", "noise": "look", "contrast": "look", "jitter": "motion", "shuffle": "motion", "freeze": "motion",
}  # fmt: skip
# A mean pixel difference (pixels span a range of 2) below which a degradation cannot be seen, as when the frames of a
# still clip are shuffled.
ALIKE = 0.01


@dataclass(frozen=True)
class ClipSettings:
    """How clips are cut and written.

    frames, height, width, fps: the size of every clip.  crops: how many clips each stretch of a video gives: the first
    shows the whole picture, the others random crops of it, at least half as high.  held_out: the share of all
    stretches, the last ones, that becomes the validation split.  formats: the file formats; clips take turns through
    them.  Both sides of a pair have the same format, or a reward could tell them apart by the codec.
    """

    frames: int
    height: int
    width: int
    fps: int | float
    kinds: tuple[Kind, ...] = tuple(DIMENSION)
    crops: int = 1
    held_out: float = 0.2
    formats: tuple[Format, ...] = ("mp4",)
    seed: int = 0


def degrade(clip: Clip, kind: Kind, generator: torch.Generator) -> Clip:
    """Degrade a clip in one way, with a random strength; pixels stay in [-1, 1]."""
    strength = float(torch.rand((), generator=generator))
    frames, (height, width) = clip.shape[1], clip.shape[2:]

    if kind == "blur":  # through a picture of a half to a quarter of the height
        small = max(1, round(height / (2 + 2 * strength))), max(1, round(width / (2 + 2 * strength)))
        pictures = F.interpolate(clip.transpose(0, 1), small, mode="bilinear", antialias=True)
        return F.interpolate(pictures, (height, width), mode="bilinear").transpose(0, 1)

    if kind == "noise":
        noise = torch.randn(clip.shape, generator=generator)
        return (clip + (0.15 + 0.25 * strength) * noise).clamp(-1, 1)

    if kind == "contrast":
        return clip.mean() + (0.5 - 0.3 * strength) * (clip - clip.mean())

    if kind == "jitter":  # move every frame by up to 1/16 to 1/8 of the short side, and repeat the pixels at its edge
        reach = max(1, round(min(height, width) * (1 + strength) / 16))
        moves = torch.randint(0, 2 * reach + 1, (frames, 2), generator=generator).tolist()
        wide = F.pad(clip, (reach, reach, reach, reach), mode="replicate")
        return torch.stack([wide[:, f, y : y + height, x : x + width] for f, (y, x) in enumerate(moves)], dim=1)

    if kind == "shuffle":
        return clip[:, torch.randperm(frames, generator=generator)]

    stop = round(strength * (frames - 1) / 2)  # freeze: a picture of the first half is repeated until the end
    return clip[:, torch.arange(frames).clamp(max=stop)]


def write_clips(
    folder: Path,
    videos: Path,
    prompts: Mapping[str, Sequence[str]],
    settings: ClipSettings,
    *,
    captions: Mapping[Path, tuple[str, str]] | None = None,
    skip_unreadable: bool = False,
    follow_links: bool = False,
    progress: Callable = iter,
) -> tuple[Path, Path]:
    """Cut clips, write them with their degradations, and write two manifests: the pairs, and the clips alone.

    videos: a file, or a folder that is searched with all folders below it (``find_videos``).  prompts: the prompts of
    the split ``train`` and, where clips are to be held out, of ``validation``; the clips of a split take its prompts in
    turn, whatever they show.  captions: (prompt, split) of each video, which all of its clips take in place of
    ``prompts``.  A folder that is already complete is left alone.  Returns the paths (pairs, clips).
    Raises PrflError when there are no videos, when one is unreadable, or when they are too short for a clip per split.
    """
    pairs_file, clips_file = folder / "pairs.jsonl", folder / "clips.jsonl"
    if pairs_file.exists() and clips_file.exists():
        return pairs_file, clips_file

    sources = find_videos(videos, follow_links=follow_links, skip_unreadable=skip_unreadable)
    for reason, paths in sources.left_out.items():
        console.say(f"left out: {listed(reason, paths)}")

    pairs: list[PreferencePair] = []
    clips: list[LabelledVideo] = []
    alike = dict.fromkeys(settings.kinds, 0)
    splits = {video: split for video, (_, split) in captions.items()} if captions else {}
    cut = _cut(sources.videos, splits, "validation" in prompts, settings, skip_unreadable)
    for number, video, split, clip in progress(cut):
        suffix = settings.formats[number % len(settings.formats)]
        prompt = captions[video][0] if captions else prompts[split][number % len(prompts[split])]
        good = folder / "videos" / f"{number:05d}.{suffix}"
        write_video(good, clip, settings.fps)
        clips.append(LabelledVideo(good, prompt, {}, split))

        # Pair the clip with each degradation that can be seen; the side of the good clip is random.
        for kind in settings.kinds:
            spoilt = degrade(clip, kind, rng.generator(settings.seed, f"degrade/{kind}", 0, number))
            if float((spoilt - clip).abs().mean()) < ALIKE:
                alike[kind] += 1
                continue
            bad = good.with_name(f"{number:05d}-{kind}.{suffix}")
            write_video(bad, spoilt, settings.fps)
            if rng.integer(2, settings.seed, f"side/{kind}", 0, number):
                pairs.append(PreferencePair(prompt, good, bad, {DIMENSION[kind]: "a"}, split))
            else:
                pairs.append(PreferencePair(prompt, bad, good, {DIMENSION[kind]: "b"}, split))

    if not pairs:
        what = "every clip looks the same with its degradations; does anything move or show in these videos?"
        raise PrflError(what, where=str(videos), fix="give other videos, or other data.generator.kinds")
    write_manifest(clips_file, clips)
    write_manifest(pairs_file, pairs)
    left_out = ", ".join(f"{count} of {kind}" for kind, count in alike.items() if count)
    console.say(f"{len(clips)} clips, {len(pairs)} pairs" + (f"; too alike to see: {left_out}" if left_out else ""))
    return pairs_file, clips_file


def _cut(
    videos: Sequence[Path], splits: Mapping[Path, str], hold_out: bool, settings: ClipSettings, skip_unreadable: bool
) -> Iterator[tuple[int, Path, str, Clip]]:
    """Cut the clips; yields (number, video, split, clip).  Stretches do not overlap, so nothing is in two splits.

    splits: the split of each video; empty where the stretches are split instead: with ``hold_out`` the last ones are
    for validation, and without it all are for training.
    """
    stretches_of: dict[Path, Stretches] = {}
    for video in videos:
        with _skipping_unreadable(skip_unreadable):
            stretches_of[video] = find_stretches(video, frames=settings.frames, fps=settings.fps)
        if video in stretches_of and (damage := stretches_of[video].damage):
            with _skipping_unreadable(skip_unreadable):
                raise damage
    _report_left_out(stretches_of, settings)

    total = sum(len(stretches.numbers) for stretches in stretches_of.values())
    train = total - max(1, round(settings.held_out * total)) if hold_out and not splits else total
    trained = [video for video in stretches_of if splits.get(video, "train") == "train" and stretches_of[video].numbers]
    if train < 1 or not trained:
        what = f"{total} clips of {settings.frames} frames at {settings.fps:g} fps fit into the videos ({len(videos)})"
        raise PrflError(what, where="data.generator.videos", fix="give more or longer videos, or fewer data.frames")

    larger = 1 if settings.crops == 1 else 2  # at twice the size, a crop of half the height is as sharp as the whole
    height, width = larger * settings.height, larger * settings.width
    first = 0
    for video, (numbers, *_) in stretches_of.items():
        with _skipping_unreadable(skip_unreadable):
            cut = cut_video(video, numbers, VideoSize(settings.frames, height, width, settings.fps))
            for stretch, whole in enumerate(cut, start=first):
                split = splits.get(video, "train" if stretch < train else "validation")
                for crop in range(settings.crops):
                    yield stretch * settings.crops + crop, video, split, _part(whole, stretch, crop, settings)
        first += len(numbers)


def _report_left_out(stretches_of: Mapping[Path, Stretches], settings: ClipSettings) -> None:
    """Print the videos that are too short, and the stretches that stand still."""
    short = [video for video, (numbers, still, _) in stretches_of.items() if not numbers and not still]
    still = {video: stretches.still for video, stretches in stretches_of.items() if stretches.still}
    if short:
        console.say(f"left out: {listed(f'shorter than {settings.frames} frames at {settings.fps:g} fps', short)}")
    if still:
        count = sum(still.values())
        where = listed("videos", list(still))
        console.say(f"left out: {count} stretches that stand still for more than half, in {where}")


@contextmanager
def _skipping_unreadable(skip: bool) -> Iterator[None]:
    """Catch the error of an unreadable video inside, and report it; without ``skip`` the error is raised.

    What was cut before the damage is kept.
    """
    try:
        yield
    except PrflError as error:
        if not skip:
            raise
        console.say(f"left out: {error.where}: {error.one_line}")


def _part(whole: Clip, stretch: int, crop: int, settings: ClipSettings) -> Float[Tensor, "3 f H W"]:
    """Crop a clip and resize it to the settings' size.

    Crop 0 is the whole picture.  The others are random parts of the same shape, at least half as high.
    """
    size = settings.height, settings.width
    if crop > 0:
        scale, y, x = torch.rand(3, generator=rng.generator(settings.seed, "crop", stretch, crop)).tolist()
        height, width = (max(side, round((1 + scale) * side)) for side in size)
        top, left = round(y * (whole.shape[2] - height)), round(x * (whole.shape[3] - width))
        whole = whole[:, :, top : top + height, left : left + width]
    if whole.shape[2:] == size:
        return whole
    pictures = F.interpolate(whole.transpose(0, 1), size, mode="bilinear", antialias=True)
    return pictures.transpose(0, 1).contiguous()
