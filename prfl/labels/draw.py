"""Several videos of each prompt for a person to compare: the files, an unlabelled manifest and the page beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from prfl.backbone import Backbone
from prfl.backbone.condition import identified
from prfl.config.schema import Config
from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import write_video
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import load_policy, weights_hash
from prfl.factory.prompts import check_prompts, load_prompts
from prfl.labels.asking import MANIFEST, PAGE, asked_of, tell
from prfl.labels.page import write_page
from prfl.rollout.sampling import Progress, SamplingSettings, decode_all, jobs, sample
from prfl.utils.console import console, progress
from prfl.utils.errors import PrflError
from prfl.utils.files import mark_written
from prfl.utils.hashing import json_hash
from prfl.utils.lock import folder_lock
from prfl.utils.text import file_stem


def draw(
    config: Config,
    per_prompt: int,
    *,
    prompts: int | None = None,
    questions: Mapping[str, str] | None = None,
) -> Path:
    """Draw videos of prompts with the config's policy, or the base where the config trains a reward; returns the page.

    prompts: how many training prompts; None is ``evaluation.prompts_per_round``.  Validation prompts come too, a
    quarter as many: a reward must be measured on labels that it was not trained on.  questions: what a person is
    asked, by dimension, "" where nobody worded it; None is what the config's reward head scores.
    Raises PrflError where there is no trained policy.
    """
    if per_prompt < 2:
        raise PrflError("one video a prompt leaves nothing to compare", where="--per-prompt", fix="--per-prompt 4")
    count = config.evaluation.prompts_per_round if prompts is None else prompts
    if count < 1:
        raise PrflError(f"{count} prompts leave nothing to draw", where="--prompts", fix="1 or more")
    with folder_lock(config.run):
        return draw_in_run(config, per_prompt, count, questions)


def draw_in_run(config: Config, per_prompt: int, count: int, questions: Mapping[str, str] | None) -> Path:
    model = build_backbone(config)
    adapter, weights = None, "base"
    if not config.trains_reward:
        load_policy(config, model)
        adapter, weights = policy_adapter_name(config), weights_hash(config)
    check_prompts(config, model)

    # What is drawn, how, and what is asked of it.
    splits = load_prompts(config.data)
    held_out = splits.get("validation", [])[: max(1, count // 4)]
    prompts = {"train": splits["train"][:count], "validation": held_out}
    scored = dict.fromkeys(config.reward.head_dimensions if config.reward else [], "")
    settings = sampling_settings(config)
    folder = config.run / "samples" / f"label-{_key(model, weights, settings, config.data.fps)}"

    rows = draw_candidates(
        model,
        folder,
        prompts,
        per_prompt,
        settings,
        adapter=adapter,
        fps=config.data.fps,
        progress=progress("sampling"),
    )
    write_manifest(folder / MANIFEST, rows)
    console.say(f"unlabelled videos: {folder / MANIFEST}")
    asked = asked_of(folder / MANIFEST, questions or scored)
    tell(asked)
    page = write_page(folder / PAGE, asked.pairs, asked.questions, progress=progress("copies that browsers play"))
    console.say(f"open in a browser: {page}; for several people: prfl labels serve {folder}")
    return page


def _key(model: Backbone, weights: str, settings: SamplingSettings, fps: float) -> str:
    """Hash everything that decides what a video shows: so labels cannot end up on the videos of another policy."""
    decides = [dict(model.facts.identity), weights, {**asdict(settings), "batch": None}, fps]
    return json_hash(decides)[:8]


def draw_candidates(
    backbone: Backbone,
    folder: Path,
    prompts: Mapping[str, Sequence[str]],
    per_prompt: int,
    settings: SamplingSettings,
    *,
    adapter: str | None,
    fps: float,
    progress: Progress = iter,
) -> list[LabelledVideo]:
    """Draw ``per_prompt`` videos of each prompt (by split) into folder/videos; returns rows without labels.

    Files that are there are not drawn again: a stopped run goes on, and more prompts or more videos a prompt join the
    old ones.
    """
    groups: list[tuple[str, str, list[Path]]] = []
    for split, prompts_of_split in prompts.items():
        for prompt in prompts_of_split:
            stem = folder / "videos" / file_stem(identified(prompt))
            groups.append((split, prompt, [stem.with_name(f"{stem.name}-{index}.mp4") for index in range(per_prompt)]))
    mark_written(folder)

    # The prompts whose videos are not all there, several in a batch.
    todo = [(prompt, files) for _, prompt, files in groups if not all(file.is_file() for file in files)]
    together = max(1, settings.batch // per_prompt)
    for start in progress(range(0, len(todo), together)):
        chunk = todo[start : start + together]
        every, indices = jobs([prompt for prompt, _ in chunk], per_prompt)
        pixels = decode_all(backbone, sample(backbone, every, indices, settings, adapter=adapter), settings.batch)
        for file, video in zip((file for _, files in chunk for file in files), pixels, strict=True):
            write_video(file, video, fps)
    return [LabelledVideo(file, str(prompt), {}, split) for split, prompt, files in groups for file in files]
