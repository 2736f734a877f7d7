"""Measure a policy's samples, beside its base's from the same noise: verdicts, rewards, motion, diversity."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.condition import texts
from prfl.evaluation import metrics
from prfl.evaluation.judge import Judge
from prfl.evaluation.media import browser_mp4
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import Scorer
from prfl.objective.distance import squared_difference
from prfl.rollout.flow import add_noise
from prfl.rollout.sampling import Progress, SamplingSettings, decode_all, jobs, sample, start_noise
from prfl.utils import processes
from prfl.utils.files import atomic_write, mark_written, whole_json

DISTANCE_SIGMAS = (0.9, 0.6, 0.3)


@dataclass(frozen=True)
class Outcome:
    """Samples of one generator.

    prompts, indices: of each of n samples.  scores: ``judge/...``, ``measured/...``, ``motion``, ``distance`` (to the
    base) and those of the rewards by their names, ``reward/...`` and ``held_out/...``, each (n,).
    spread: diversity by prompt.  pixels: of the first samples of the list only, (kept, 3, f, h, w).
    seconds: for drawing and decoding all of them.
    """

    name: str
    settings: SamplingSettings
    prompts: list[str]
    indices: list[int]
    scores: dict[str, Tensor]
    spread: dict[str, float]
    pixels: Float[Tensor, "k 3 f h w"]
    seconds: float


def measure(
    backbone: Backbone,
    prompts: Sequence[str],
    per_prompt: int,
    settings: SamplingSettings,
    *,
    name: str,
    adapter: str | None,
    judge: Judge | None = None,
    rewards: Mapping[str, Scorer] | None = None,
    keep_videos: int = 8,
    progress: Progress = iter,
) -> Outcome:
    """Draw ``per_prompt`` samples of each prompt, decode and score them; no more than a few prompts are held at once.

    rewards: by name, called with clean latents at sigma 0.  keep_videos: how many decoded videos are kept: the first
    sample of each prompt, in the order of the prompts.  Several processes share the prompts out, and all get the whole.
    """
    local = processes.share(prompts)
    outcome = None
    if local:
        outcome = _measure(
            backbone, local, per_prompt, settings, name, adapter, judge, rewards or {}, keep_videos, progress
        )
    return joined([part for part in processes.gather(outcome) if part is not None], keep_videos)


def joined(parts: Sequence[Outcome], keep_videos: int) -> Outcome:
    """Join several outcomes, of the same generator and measures on other prompts, to one."""
    first = parts[0]
    prompts: list[str] = []
    indices: list[int] = []
    spread: dict[str, float] = {}
    for part in parts:
        prompts += part.prompts
        indices += part.indices
        spread |= part.spread

    scores = {key: torch.cat([part.scores[key] for part in parts]) for key in first.scores}
    pixels = torch.cat([part.pixels for part in parts])[:keep_videos]
    seconds = max(part.seconds for part in parts)
    return Outcome(first.name, first.settings, prompts, indices, scores, spread, pixels, seconds)


def _measure(
    backbone: Backbone,
    prompts: Sequence[str],
    per_prompt: int,
    settings: SamplingSettings,
    name: str,
    adapter: str | None,
    judge: Judge | None,
    rewards: Mapping[str, Scorer],
    keep_videos: int,
    progress: Progress,
) -> Outcome:
    """Do what ``measure`` does, in one process."""
    columns: dict[str, list[Tensor]] = {}
    kept: list[Tensor] = []
    spread: dict[str, float] = {}
    seconds = 0.0

    together = max(1, settings.batch // per_prompt)
    for start in progress(range(0, len(prompts), together)):
        batch, indices = jobs(prompts[start : start + together], per_prompt)
        began = time.perf_counter()
        latents = sample(backbone, batch, indices, settings, adapter=adapter)
        pixels = decode_all(backbone, latents, settings.batch)
        seconds += time.perf_counter() - began

        scores = _scores(backbone, latents, pixels, batch, judge, rewards)
        if adapter is not None:
            noise = start_noise(latents.shape[1:], settings.seed, batch, indices)
            scores["distance"] = distance(backbone, adapter, latents, noise, batch)
        for key, values in scores.items():
            columns.setdefault(key, []).append(values.detach().float().cpu())

        spread |= metrics.diversity(pixels, texts(batch))
        kept += [video.clone() for video in pixels[::per_prompt][: keep_videos - len(kept)]]

    every, numbers = jobs(prompts, per_prompt)
    joined_scores = {key: torch.cat(values) for key, values in columns.items()}
    return Outcome(name, settings, texts(every), numbers, joined_scores, spread, torch.stack(kept), seconds)


@torch.no_grad()
def _scores(
    backbone: Backbone,
    latents: Tensor,
    pixels: Tensor,
    prompts: list[str],
    judge: Judge | None,
    rewards: Mapping[str, Scorer],
) -> dict[str, Tensor]:
    """Score samples by motion, judge and rewards: each (b,), by name."""
    scores = {"motion": metrics.motion(latents)}
    if judge is not None:
        for key, values in judge(pixels, texts(prompts)).items():
            scores[key if key.startswith("measured/") else f"judge/{key}"] = values
    for name, reward in rewards.items():
        sigma = torch.zeros(len(latents), device=backbone.facts.device)
        logits = reward(latents.to(backbone.facts.device), sigma, backbone.condition(prompts))
        scores |= {f"{name}/{key}": values for key, values in logits.items()}
    return scores


@torch.no_grad()
def distance(
    backbone: Backbone,
    adapter: str,
    latents: Float[Tensor, "b c t h w"],
    noise: Float[Tensor, "b c t h w"],
    prompts: list[str],
) -> Float[Tensor, " b"]:
    """Average (v_policy - v_base)^2 at the samples, noised to a few levels."""
    device, condition = backbone.facts.device, backbone.condition(prompts)
    clean, noise = latents.to(device), noise.to(device)
    values = []
    with backbone.adapter(adapter):
        for level in DISTANCE_SIGMAS:
            sigma = torch.full((len(clean),), level, device=device)
            values.append(squared_difference(backbone, add_noise(clean, noise, sigma), sigma, condition))
    return torch.stack(values).mean(0)


def summarise(outcome: Outcome) -> dict[str, Interval]:
    """Average every score, with an interval over prompts; ``diversity`` where a prompt has two samples."""
    summary = {key: metrics.mean_interval(values, outcome.prompts) for key, values in outcome.scores.items()}
    if outcome.spread:
        summary["diversity"] = metrics.diversity_interval(outcome.spread)
    return summary


def compare(after: Outcome, before: Outcome) -> dict[str, Interval]:
    """Average after - before for every score that both have, paired sample by sample, with an interval over prompts."""
    assert (after.prompts, after.indices) == (before.prompts, before.indices), "not the same samples"
    assert after.settings.seed == before.settings.seed, "not the same noise"
    shared = [key for key in after.scores if key in before.scores]
    difference = {
        key: metrics.difference_interval(after.scores[key], before.scores[key], after.prompts) for key in shared
    }
    if after.spread:
        change = {prompt: value - before.spread[prompt] for prompt, value in after.spread.items()}
        difference["diversity"] = metrics.diversity_interval(change)
    return difference


def flat(summary: dict[str, Interval]) -> dict[str, float]:
    """Take the values alone, for a training log."""
    return {key: interval.value for key, interval in summary.items()}


def write_results(
    folder: Path, outcomes: Sequence[Outcome], fps: float, made_by: Mapping[str, Any] | None = None
) -> Path:
    """Write ``results.json`` and ``videos/NAME-NNN.mp4`` (which browsers play); the first outcome is the reference.

    made_by: what tells the policy that was measured.  Returns the path of results.json, which ``report.py`` reads.
    """
    reference = outcomes[0]
    mark_written(folder)
    for outcome in outcomes:
        for number, video in enumerate(outcome.pixels):
            with atomic_write(folder / "videos" / f"{outcome.name}-{number:03d}.mp4") as temporary:
                temporary.write_bytes(browser_mp4(video, fps))

    results: dict[str, Any] = {
        "outcomes": {outcome.name: results_facts(outcome, reference) for outcome in outcomes},
        "prompts": len(set(reference.prompts)),
        "samples": len(reference.prompts),
        "videos": _videos(outcomes),
        "rows": _rows(outcomes),
    }
    if made_by:
        results["policy"] = dict(made_by)

    path = folder / "results.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def results_facts(outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    """Write an outcome for a results.json, without its rows and videos."""
    difference = {} if outcome is reference else compare(outcome, reference)
    return {
        "settings": asdict(outcome.settings),
        "seconds": round(outcome.seconds, 3),
        "spread": outcome.spread,
        "summary": {key: asdict(interval) for key, interval in summarise(outcome).items()},
        "difference": {key: asdict(interval) for key, interval in difference.items()},
    }


def read_outcome(path: Path, name: str) -> Outcome | None:
    """Read one generator's outcome of a results.json, without its videos; None where a crash has damaged it."""
    results = whole_json(path, "outcomes", "rows")
    return None if results is None else outcome_in(results, name)


def outcome_in(results: Mapping[str, Any], name: str) -> Outcome:
    """Take one generator's outcome from the content of a results.json, without its videos."""
    facts, rows = results["outcomes"][name], results["rows"]
    keys = rows[0][name]
    return Outcome(
        name,
        SamplingSettings.read(facts["settings"]),
        [row["prompt"] for row in rows],
        [row["sample"] for row in rows],
        {key: torch.tensor([row[name][key] for row in rows]) for key in keys},
        facts["spread"],
        torch.empty(0, 3, 1, 1, 1),
        facts["seconds"],
    )


def _videos(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """List which files show which row: the first sample of each prompt."""
    first_rows = [row for row, index in enumerate(outcomes[0].indices) if index == 0]
    videos: list[dict[str, object]] = []
    for number in range(min(len(outcome.pixels) for outcome in outcomes)):
        files = {outcome.name: f"videos/{outcome.name}-{number:03d}.mp4" for outcome in outcomes}
        videos.append({"row": first_rows[number], "files": files})
    return videos


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """List the samples: prompt, sample index, and every outcome's scores."""
    rows: list[dict[str, object]] = []
    for i, (prompt, index) in enumerate(zip(outcomes[0].prompts, outcomes[0].indices, strict=True)):
        row: dict[str, object] = {"prompt": prompt, "sample": index}
        for outcome in outcomes:
            row[outcome.name] = {key: round(float(values[i]), 6) for key, values in outcome.scores.items()}
        rows.append(row)
    return rows
