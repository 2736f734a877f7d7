"""Steered videos of a config: drawn prompt by prompt, each with its record, and a page of all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.condition import identified
from prfl.config.schema import Config
from prfl.evaluation.judge import Judge
from prfl.evaluation.media import browser_mp4
from prfl.evaluation.steering_page import write_steering_page
from prfl.factory.steering import Steering, build_steering
from prfl.rollout.sampling import decode_all
from prfl.steering.chains import Rejected, Steered
from prfl.steering.sampling import steer
from prfl.utils import processes
from prfl.utils.console import console, progress
from prfl.utils.files import atomic_write, mark_written, whole_json
from prfl.utils.hashing import json_hash
from prfl.utils.text import file_stem

SHOWN = 3  # rejected chains of a video that are decoded for the page


def steer_in_run(
    config: Config, model: Backbone, prompts: Sequence[str], adapter: str | None, weights: str, judge: Judge | None
) -> None:
    """Draw a steered video of each prompt into a folder of samples/; videos that are there are not drawn again.

    weights: tells the policy from others.  Several processes share the prompts out, and the main one writes the page.
    """
    assert config.steering is not None
    steering = build_steering(config, model)
    folder = config.run / "samples" / f"steered-{config.steering.name}-{_key(config, model, steering, weights)}"
    mark_written(folder)

    # The prompts that have no record yet.
    todo = [prompt for prompt in processes.share(prompts) if whole_json(record_path(folder, prompt), "kept") is None]
    together = max(1, steering.settings.batch // steering.method.chains)
    for start in progress("sampling")(range(0, len(todo), together)):
        batch = todo[start : start + together]
        ((_, steered),) = steer(
            model,
            batch,
            [0] * len(batch),
            steering.method,
            replace(steering.settings, batch=max(steering.settings.batch, steering.method.chains)),
            steering.schedule,
            steering.looks,
            adapter=adapter,
            decode_price=steering.decode_price,
        )
        for group, prompt in enumerate(batch):
            write_record(folder, prompt, group, len(batch), steered, model, config.data.fps, judge)

    # All records together, and their page.
    processes.wait()
    if not processes.is_main():
        return
    path = folder / "results.json"
    with atomic_write(path) as temporary:
        results = _results(config, steering, folder, prompts, adapter)
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = write_steering_page(path, f"{config.steering.name}: {config.run.resolve().name}")
    console.print(f"open in a browser: {page}", markup=False, soft_wrap=True)


def _key(config: Config, model: Backbone, steering: Steering, weights: str) -> str:
    """Hash everything that decides what a video shows; a budget has become the method's chains."""
    assert config.steering is not None
    section = {**config.steering.model_dump(mode="json"), "chains": steering.method.chains}
    settings = {**asdict(steering.settings), "batch": None}
    followed = None if config.reward is None else config.reward.model_dump(mode="json")
    return json_hash([dict(model.facts.identity), weights, section, settings, followed, config.data.fps])[:8]


def record_path(folder: Path, prompt: str) -> Path:
    return folder / "records" / f"{file_stem(identified(prompt))}.json"


def write_record(
    folder: Path,
    prompt: str,
    group: int,
    groups: int,
    steered: Steered,
    model: Backbone,
    fps: float,
    judge: Judge | None,
) -> None:
    """Write what became of one video: its kept chains and a few rejected ones as mp4, then the record of all."""
    kept, rows = steered.kept, steered.kept.rows_of(group)
    rejected = sorted((each for each in steered.rejected if each.group == group), key=_last_score)
    shown = _spread(rejected)
    latents = [kept.latents[row].float().cpu() for row in rows] + [each.clean for each in shown]
    pixels = decode_all(model, torch.stack(latents))
    verdicts = judge(pixels, [prompt] * len(pixels)) if judge else {}

    # Every decoded chain as a file, kept ones first.
    videos = []
    for number, video in enumerate(pixels):
        file = f"videos/{file_stem(identified(prompt))}-{number}.mp4"
        with atomic_write(folder / file) as temporary:
            temporary.write_bytes(browser_mp4(video, fps))
        videos.append({"file": file, "scores": _scores(verdicts, number)})

    record = {
        "prompt": prompt,
        "kept": [
            {"origin": kept.origins[row], "trace": kept.traces[row], **videos[number]}
            for number, row in enumerate(rows)
        ],
        "rejected": [
            {"origin": each.origin, "node": each.node, "trace": each.trace}
            | (videos[len(rows) + shown.index(each)] if each in shown else {})
            for each in rejected
        ],
        "calls": asdict(steered.calls / groups),
        "log": {name: list(values) for name, values in steered.log.items()},
    }
    with atomic_write(record_path(folder, prompt)) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _last_score(rejected: Rejected) -> float:
    return -rejected.trace[-1][1] if rejected.trace else 0.0


def _spread(rejected: Sequence[Rejected]) -> list[Rejected]:
    """The best, the middle and the worst of the rejected, as far as there are so many."""
    if len(rejected) <= SHOWN:
        return list(rejected)
    return [rejected[round(number * (len(rejected) - 1) / (SHOWN - 1))] for number in range(SHOWN)]


def _scores(verdicts: dict[str, Tensor], number: int) -> dict[str, float]:
    named = {key if key.startswith("measured/") else f"judge/{key}": values for key, values in verdicts.items()}
    return {key: round(float(values[number]), 6) for key, values in named.items()}


def _results(
    config: Config, steering: Steering, folder: Path, prompts: Sequence[str], adapter: str | None
) -> dict[str, Any]:
    """All records and what they have in common, as the page reads it."""
    assert config.steering is not None
    every = [whole_json(record_path(folder, prompt), "kept") for prompt in prompts]
    records = [record for record in every if record is not None]
    spent = {key: sum(record["calls"][key] for record in records) / len(records) for key in asdict(steering.calls)}
    return {
        "method": config.steering.name,
        "steering": {**config.steering.model_dump(mode="json"), "chains": steering.method.chains},
        "generator": "base" if adapter is None else "policy",
        "sigmas": steering.schedule.sigmas.tolist(),
        "guidance_scale": asdict(steering.settings)["guidance_scale"],
        "calls": spent,
        "whole": asdict(steering.whole),
        "videos": records,
    }
