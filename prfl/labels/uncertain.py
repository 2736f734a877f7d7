"""How unsure saved heads are of pairs of videos: people are asked first where one's scores lie closest together.

Or where several heads differ most: what all of them call even is often a tie, and an answer to it teaches little.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import stdev

import torch

from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.reward import load_reward
from prfl.labels.pairs import Pair
from prfl.reward.checkpoint import read_config
from prfl.runs.score import Scorer, ask_of, clip_of, find_backbone, read_latents
from prfl.utils.console import progress
from prfl.utils.errors import PrflError
from prfl.utils.text import did_you_mean

VideoScores = Mapping[str, Mapping[str, float]]
"""By the video's name and the dimension."""


def uncertainties(
    folder: Path, pairs: Sequence[Pair], heads: Sequence[str], model: str | None, asked: Collection[str]
) -> tuple[dict[str, float], list[str]]:
    """Score the pairs' clean videos by saved rewards; returns how unsure they are of each, and what they score.

    heads: one, which is unsure where its scores lie together (``unsure``), or several (``differ``).
    asked: the dimensions that count; {} is all.  Raises PrflError where a head scores none of them, or not the same,
    and what ``prfl score`` raises.
    """
    by_head = [head_scores(folder, pairs, head, model) for head in heads]
    scored = list(next(iter(by_head[0].values())))
    for head, scores in zip(heads, by_head, strict=True):
        others = list(next(iter(scores.values())))
        if set(others) != set(scored):
            what = f"{head} scores {', '.join(others)}, and {heads[0]} {', '.join(scored)}"
            raise PrflError(what, where="--head", fix="heads of the same dimensions, trained from different seeds")
    counted = [name for name in scored if not asked or name in asked]
    if not counted:
        fix = did_you_mean(sorted(asked)[0], scored)
        raise PrflError(f"the head scores none of {', '.join(sorted(asked))}", where="--head", fix=fix)
    return (differ(pairs, by_head, counted) if len(heads) > 1 else unsure(pairs, by_head[0], counted)), scored


def differ(pairs: Sequence[Pair], by_head: Sequence[VideoScores], dimensions: Sequence[str]) -> dict[str, float]:
    """Return, by "a b", the standard deviation over heads of how much better a is, the mean over dimensions."""
    deviations = {}
    for pair in pairs:
        gaps = [[scores[pair.a][name] - scores[pair.b][name] for scores in by_head] for name in dimensions]
        deviations[f"{pair.a} {pair.b}"] = sum(map(stdev, gaps)) / len(gaps)
    return deviations


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
    asks = {name: ask_of(backbone, folder / name, prompt, clip) for name, prompt in prompts.items()}
    conditions = {ask: backbone.condition([ask]) for ask in dict.fromkeys(asks.values())}

    scores = {}
    for name, ask in progress("scoring")(list(asks.items())):
        latents = read_latents(folder / name, backbone, clip)
        values = scorer.at(latents, 0.0, conditions[ask])
        scores[name] = {dimension: float(value) for dimension, value in values.items()}
    return scores
