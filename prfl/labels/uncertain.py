"""How unsure a saved head is of pairs of videos: people are asked first where its scores lie closest together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.reward import load_reward
from prfl.labels.pairs import Pair
from prfl.reward.checkpoint import read_config
from prfl.runs.score import Scorer, clip_of, find_backbone, read_latents
from prfl.utils.console import progress
from prfl.utils.errors import PrflError
from prfl.utils.text import did_you_mean

VideoScores = Mapping[str, Mapping[str, float]]
"""By the video's name and the dimension."""


def uncertainties(
    folder: Path, pairs: Sequence[Pair], head: str, model: str | None, asked: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """Score the pairs' clean videos by a saved reward; returns how unsure it is of each, and what it scores.

    asked: the dimensions that count; {} is all.  Raises PrflError where the head scores none of them, and what
    ``prfl score`` raises.
    """
    scores = head_scores(folder, pairs, head, model)
    scored = list(next(iter(scores.values())))
    counted = [name for name in scored if not asked or name in asked]
    if not counted:
        fix = did_you_mean(sorted(asked)[0], scored)
        raise PrflError(f"the head scores none of {', '.join(sorted(asked))}", where="--head", fix=fix)
    return unsure(pairs, scores, counted), scored


def unsure(pairs: Sequence[Pair], scores: VideoScores, dimensions: Sequence[str]) -> dict[str, float]:
    """Return, by "a b", minus the distance between the two videos' scores, the mean over dimensions: 0 is most unsure.

    scores: in standard deviations, so that dimensions compare.
    """
    unsure_of = {}
    for pair in pairs:
        distances = [abs(scores[pair.a][name] - scores[pair.b][name]) for name in dimensions]
        unsure_of[f"{pair.a} {pair.b}"] = -sum(distances) / len(distances)
    return unsure_of


@torch.no_grad()
def head_scores(folder: Path, pairs: Sequence[Pair], head: str, model: str | None) -> dict[str, dict[str, float]]:
    """Score every video of the pairs, clean, with its prompt."""
    backbone = find_backbone(head, read_config(head), model, None, "auto")
    reward = load_reward(head, backbone)
    scorer = Scorer(backbone, reward, build_latents_scorer(reward, backbone), noise_draws=1, seed=0)
    clip = clip_of(reward.card, {})
    prompts = {name: pair.prompt for pair in pairs for name in (pair.a, pair.b)}
    conditions = {prompt: backbone.condition([prompt]) for prompt in dict.fromkeys(prompts.values())}

    scores = {}
    for name, prompt in progress("scoring")(list(prompts.items())):
        latents = read_latents(folder / name, backbone, clip)
        values = scorer.at(latents, 0.0, conditions[prompt])
        scores[name] = {dimension: float(value) for dimension, value in values.items()}
    return scores
