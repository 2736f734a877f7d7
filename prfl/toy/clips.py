"""Video files and manifests of the shapes world, so that its clips take the same path as anyone's videos.

Three sets: ``mixture`` (the flawed pretraining data), ``curated`` (the same without flaws) and ``labelled`` (samples
of a generator, labelled by the oracle as people would label them).  A finished set is not made again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.toy import oracle, renderer
from prfl.utils.video_size import VideoSize

CLIP = VideoSize(renderer.FRAMES, renderer.SIZE, renderer.SIZE, renderer.FPS)

Sampler = Callable[[list[str], list[int]], Float[Tensor, "b 3 f h w"]]
"""(prompts, sample index of each) -> decoded pixels in [-1, 1]; build injects the backbone's own sampler."""


def model_folder() -> Path:
    """Return the shapes world's base model, an ordinary diffusers pipeline folder inside the package."""
    return Path(__file__).parent / "model"


def reward_folder() -> Path:
    """Return a latent reward for that model, trained on its own samples as the oracle labels them."""
    return Path(__file__).parent / "reward"


def critic_folder() -> Path:
    """Return a small vision-language model that answers questions about the world's videos (critic_recipe.py)."""
    return Path(__file__).parent / "critic"


def mixture(folder: Path, captions: Sequence[str], count: int, seed: int, wrong: float, unsteady: float) -> Path:
    """Render clips with a share of flaws (both 0: curated clips); returns the manifest."""
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    from prfl.data.video import write_video

    rows = []
    for start in range(0, count, 64):
        scenes = renderer.sample_scenes(seed, start, min(64, count - start), list(captions), wrong, unsteady)
        for offset, (scene, pixels) in enumerate(zip(scenes, renderer.render(scenes), strict=True)):
            path = folder / "videos" / f"{start + offset:05d}.mp4"
            write_video(path, pixels, renderer.FPS)
            rows.append(LabelledVideo(video=path, prompt=scene.captioned.caption, label={}, split=None))
    write_manifest(manifest, rows)
    return manifest


def labelled(
    folder: Path,
    splits: Mapping[str, Sequence[str]],
    per_prompt: Mapping[str, int],
    sample: Sampler,
    other_captions: int = 0,
    batch: int = 64,
    progress: Callable = iter,
) -> Path:
    """Draw samples of a generator, with the oracle's verdicts as labels 0 or 1; returns the manifest.

    splits: the captions of each split, which its rows carry.  per_prompt: for each split that is drawn, how many
    samples of each caption.  other_captions: for how many other training captions, each one attribute away from its
    own, a training sample is judged as well: one row more for each.
    """
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    from prfl.data.video import read_video, write_video

    jobs = [
        (split, caption, index)
        for split, count in per_prompt.items()
        for caption in splits.get(split, ())
        for index in range(count)
    ]
    near = neighbours(splits.get("train", ()))

    rows = []
    for start in progress(range(0, len(jobs), batch)):
        part = jobs[start : start + batch]
        pixels = sample([caption for _, caption, _ in part], [index for *_, index in part]).clamp(-1, 1)
        files = [folder / "videos" / f"{start + offset:05d}.mp4" for offset in range(len(part))]
        for path, video in zip(files, pixels, strict=True):
            write_video(path, video, renderer.FPS)

        # Labels are of what the file shows, as people's would be.
        measured = oracle.measure(torch.stack([read_video(path, CLIP) for path in files]))
        for offset, (path, (split, caption, _)) in enumerate(zip(files, part, strict=True)):
            captions = [caption]
            if split == "train" and other_captions:
                draw = random.Random(f"other captions {start + offset}")
                captions += draw.sample(near[caption], min(other_captions, len(near[caption])))
            for prompt in captions:
                rows.append(LabelledVideo(path, prompt, verdicts(measured, offset, prompt), split))
    write_manifest(manifest, rows)
    return manifest


def neighbours(captions: Sequence[str]) -> dict[str, list[str]]:
    """List, for each caption, those of the others that differ from it in one attribute."""
    parsed = {caption: astuple(renderer.Attributes.parse(caption)) for caption in captions}
    near: dict[str, list[str]] = {caption: [] for caption in parsed}
    for caption, attributes in parsed.items():
        for other, other_attributes in parsed.items():
            if sum(a != b for a, b in zip(attributes, other_attributes, strict=True)) == 1:
                near[caption].append(other)
    return near


def verdicts(measured: dict[str, Tensor], video: int, caption: str) -> dict[str, float]:
    """Label one measured video for a caption."""
    judged = oracle.compare({name: values[video : video + 1] for name, values in measured.items()}, [caption])
    return {name: float(judged[name]) for name in oracle.DIMENSIONS}


def judge(pixels: Float[Tensor, "b 3 f h w"], prompts: list[str]) -> dict[str, Tensor]:
    """Judge videos, as a ``Judge``: float verdicts, ``all`` of them together, and the size, which is no verdict."""
    measured = oracle.measure(pixels)
    verdicts = {name: value.to(torch.float32) for name, value in oracle.compare(measured, prompts).items()}
    return verdicts | {"measured/size": oracle.size(measured, prompts)}
