"""What a policy makes of prompts, beside its base from the same noise: verdicts, trained reward, motion, diversity."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.backbone.wan import WanBackbone
from prfl.data.files import replacing
from prfl.evaluation import metrics
from prfl.evaluation.judge import Judge
from prfl.evaluation.media import browser_mp4
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import Scorer
from prfl.evaluation.sampling import Progress, SamplingSettings, decode_all, jobs, sample


@dataclass(frozen=True)
class Outcome:
    """Samples of one generator.

    prompts, indices: of each of n samples.  scores: ``judge/...``, ``reward/...`` and ``motion``, each (n,).
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
    backbone: WanBackbone,
    prompts: Sequence[str],
    per_prompt: int,
    settings: SamplingSettings,
    *,
    name: str,
    adapter: str | None,
    judge: Judge | None = None,
    reward: Scorer | None = None,
    keep_videos: int = 8,
    progress: Progress = iter,
) -> Outcome:
    """Draw ``per_prompt`` samples of each prompt, decode and score them; no more than a few prompts are held at once.

    reward: the trained reward, called with clean latents at sigma 0.  keep_videos: how many decoded videos are kept:
    the first sample of each prompt, in the order of the prompts.
    """
    columns: dict[str, list[Tensor]] = {}
    kept: list[Tensor] = []
    spread: dict[str, float] = {}
    seconds = 0.0
    together = max(1, settings.batch // per_prompt)
    for start in progress(range(0, len(prompts), together)):
        some, indices = jobs(prompts[start : start + together], per_prompt)
        began = time.perf_counter()
        latents = sample(backbone, some, indices, settings, adapter=adapter)
        pixels = decode_all(backbone, latents, settings.batch)
        seconds += time.perf_counter() - began
        for key, values in _scores(backbone, latents, pixels, some, judge, reward).items():
            columns.setdefault(key, []).append(values.detach().float().cpu())
        spread |= metrics.diversity(pixels, some)
        kept += [video.clone() for video in pixels[::per_prompt][: keep_videos - len(kept)]]
    every, numbers = jobs(prompts, per_prompt)
    scores = {key: torch.cat(values) for key, values in columns.items()}
    return Outcome(name, settings, every, numbers, scores, spread, torch.stack(kept), seconds)


@torch.no_grad()
def _scores(
    backbone: WanBackbone,
    latents: Tensor,
    pixels: Tensor,
    prompts: list[str],
    judge: Judge | None,
    reward: Scorer | None,
) -> dict[str, Tensor]:
    scores = {"motion": metrics.motion(latents)}
    if judge is not None:
        scores |= {f"judge/{key}": values for key, values in judge(pixels, prompts).items()}
    if reward is not None:
        sigma = torch.zeros(len(latents), device=backbone.device)
        given = reward(latents.to(backbone.device), sigma, backbone.condition(prompts))
        scores |= {f"reward/{key}": values for key, values in given.items()}
    return scores


def summarise(outcome: Outcome) -> dict[str, Interval]:
    """Mean of every score, interval over prompts; ``diversity`` where a prompt has two samples."""
    summary = {key: metrics.mean_interval(values, outcome.prompts) for key, values in outcome.scores.items()}
    return summary | ({"diversity": metrics.diversity_interval(outcome.spread)} if outcome.spread else {})


def compare(after: Outcome, before: Outcome) -> dict[str, Interval]:
    """Mean of after - before for every score that both have, paired sample by sample, interval over prompts."""
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
    """The values alone: what a training log takes."""
    return {key: interval.value for key, interval in summary.items()}


def write_results(folder: Path, outcomes: Sequence[Outcome], fps: float) -> Path:
    """Write ``results.json`` and ``videos/NAME-NNN.mp4`` (which browsers play); the first outcome is the reference.

    Returns the path of results.json, which ``report.py`` reads.
    """
    reference = outcomes[0]
    for outcome in outcomes:
        for number, video in enumerate(outcome.pixels):
            with replacing(folder / "videos" / f"{outcome.name}-{number:03d}.mp4") as temporary:
                temporary.write_bytes(browser_mp4(video, fps))
    results = {
        "outcomes": {
            outcome.name: {
                "settings": asdict(outcome.settings),
                "seconds": round(outcome.seconds, 3),
                "summary": {key: asdict(interval) for key, interval in summarise(outcome).items()},
                "difference": {}
                if outcome is reference
                else {key: asdict(interval) for key, interval in compare(outcome, reference).items()},
            }
            for outcome in outcomes
        },
        "prompts": len(set(reference.prompts)),
        "samples": len(reference.prompts),
        "videos": _videos(outcomes),
        "rows": _rows(outcomes),
    }
    path = folder / "results.json"
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _videos(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Which files show which row: the first sample of each prompt."""
    first = [row for row, index in enumerate(outcomes[0].indices) if index == 0]
    shown = range(min(len(outcome.pixels) for outcome in outcomes))
    return [
        {"row": first[number], "files": {o.name: f"videos/{o.name}-{number:03d}.mp4" for o in outcomes}}
        for number in shown
    ]


def _rows(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i, (prompt, index) in enumerate(zip(outcomes[0].prompts, outcomes[0].indices, strict=True)):
        scores = {o.name: {key: round(float(values[i]), 6) for key, values in o.scores.items()} for o in outcomes}
        rows.append({"prompt": prompt, "sample": index, **scores})
    return rows
