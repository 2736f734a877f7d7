"""Video files and manifests of the shapes world, so that its clips take the same path as anyone's videos.

Three sets: ``mixture`` (the flawed pretraining data), ``curated`` (the same without flaws) and ``labelled`` (samples
of a generator, labelled by the oracle as people would label them).  A finished set is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.shapes import oracle, world
from prfl.data.video import write_video

Sampler = Callable[[list[str], list[int]], Float[Tensor, "b 3 f h w"]]
"""(prompts, sample index of each) -> decoded pixels in [-1, 1]; build injects the backbone's own sampler."""


def model_folder() -> Path:
    """The shapes world's base model, an ordinary diffusers pipeline folder inside the package."""
    return Path(__file__).parent / "model"


def reward_folder() -> Path:
    """A latent reward for that model, trained on its own samples as the oracle labels them."""
    return Path(__file__).parent / "reward"


def mixture(folder: Path, captions: Sequence[str], count: int, seed: int, wrong: float, unsteady: float) -> Path:
    """Rendered clips with a share of flaws (both 0: curated clips); returns the manifest."""
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    rows = []
    for start in range(0, count, 64):
        scenes = world.sample_scenes(seed, start, min(64, count - start), list(captions), wrong, unsteady)
        for offset, (scene, pixels) in enumerate(zip(scenes, world.render(scenes), strict=True)):
            path = folder / "videos" / f"{start + offset:05d}.mp4"
            write_video(path, pixels, world.FPS)
            rows.append(LabelledVideo(video=path, prompt=scene.said.caption, label={}, split=None))
    write_manifest(manifest, rows)
    return manifest


def labelled(
    folder: Path,
    splits: Mapping[str, Sequence[str]],
    per_prompt: int,
    sample: Sampler,
    batch: int = 64,
    progress: Callable = iter,
) -> Path:
    """``per_prompt`` samples of a generator for each caption, with the oracle's verdicts as labels 0 or 1.

    splits: the captions of each split, which its rows carry.
    """
    manifest = folder / "manifest.jsonl"
    if manifest.exists():
        return manifest
    split_of = {caption: split for split, captions in splits.items() for caption in captions}
    jobs = [(caption, index) for caption in split_of for index in range(per_prompt)]
    rows = []
    for start in progress(range(0, len(jobs), batch)):
        part = jobs[start : start + batch]
        prompts = [caption for caption, _ in part]
        pixels = sample(prompts, [index for _, index in part]).clamp(-1, 1)
        verdicts = oracle.judge(pixels, prompts)
        for offset, video in enumerate(pixels):
            path = folder / "videos" / f"{start + offset:05d}.mp4"
            write_video(path, video, world.FPS)
            label = {name: float(verdicts[name][offset]) for name in oracle.DIMENSIONS}
            rows.append(LabelledVideo(video=path, prompt=prompts[offset], label=label, split=split_of[prompts[offset]]))
    write_manifest(manifest, rows)
    return manifest


def judge(pixels: Float[Tensor, "b 3 f h w"], prompts: list[str]) -> dict[str, Tensor]:
    """The oracle as a ``Judge``: float verdicts, with ``all`` of them together."""
    return {name: value.to(torch.float32) for name, value in oracle.judge(pixels, prompts).items()}
