"""A stage that trains a reward; and rewards measured side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prfl.backbone import Backbone
from prfl.backbone.experts import highest_read
from prfl.backbone.network import reach
from prfl.config.schema import Config
from prfl.evaluation import plots, reward_eval, tables
from prfl.factory.data import Dataset, clip_sizes
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.objective import build_preference
from prfl.factory.provenance import Moment, run_hash
from prfl.factory.reward import Reward, build_new_reward, reward_hash, save_reward_stamp
from prfl.reward import LatentReward, RewardCard, RewardEnsemble
from prfl.reward.ranking_accuracy import advice, doubts
from prfl.runs.outcomes import keep_report
from prfl.runs.stage_run import StageRun
from prfl.training.loop import Callbacks, Hook, TrainResult
from prfl.utils import processes
from prfl.utils.console import console, progress, warn
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write


def train_reward(stage: StageRun, validation: Dataset | None, test: Dataset | None) -> TrainResult:
    """Train, measure on the validation rows at the end, and save to ``run/reward``; then measure on the test rows.

    Where there are no validation rows, the test rows are what the card has.
    """
    config, model, run = stage.config, stage.model, stage.folder
    assert stage.clips is not None
    reward = build_new_reward(config, model)
    if isinstance(reward, LatentReward) and reward.adapter:
        layers, blocks = reach(model, reward.adapter.name)
        console.say(f"the reward's adapter on {layers} layers of {blocks} blocks")
    objective = build_preference(config, model, reward, stage.clips)
    held, split = (test, "test") if validation is None else (validation, "validation")
    warn_of_incomparable({"reward": reward}, held)

    def watch(step: int) -> dict[str, float]:
        """Measure pairwise accuracy within a prompt at three noise levels: is it learning, or overfitting?"""
        few = [reward_eval.Level("point", sigma, sigma) for sigma in (0.0, 0.5, min(0.9, highest_read(model.facts)))]
        assert validation is not None
        scorers = {"reward": build_latents_scorer(reward, model)}
        rows = reward_eval.evaluate(scorers, reward_eval.held_out(validation), few, noise_draws=1, resamples=1)
        last = rows[-1].dimension if rows else ""
        return {f"accuracy/sigma {r.level.low:g}": r.accuracy.value for r in rows if r.dimension == last}

    def measure(data: Dataset, of_split: str) -> tuple[list[reward_eval.Row], Path]:
        """One draw, no ties, no more than the card and the plot need: `prfl eval` takes its time.

        A reward of clean videos decodes at every level: it is measured where it can be used, up to sigma 0.5.
        """
        highest = math.inf if reward.noise_aware else 0.5
        readable = reward_eval.up_to(reward_eval.levels(), highest_read(model.facts))
        bins = [level for level in readable if level.kind == "bin" and level.high <= highest]
        path = run.path / ("reward_eval-test.json" if of_split == "test" else "reward_eval.json")
        facts = {"split": of_split}
        return measure_reward(config, {"reward": reward}, model, data, None, path, bins, noise_draws=1, **facts), path

    def finish(step: int) -> dict[str, float]:
        reward.card = card(config)
        if held is not None:
            rows, path = measure(held, split)
            reward.card = card(config, **reward_eval.measured_card(rows, "reward"))
            try:
                reward.calibrate(clean_logits(reward, model, held))
            except PrflError as error:  # what was trained is saved all the same
                warn(f"the scores are not normalised: {error.what}")
        if processes.is_main():
            reward.save_pretrained(run.path / "reward")
            made_by = run_hash(run.path, stage.run_id)
            save_reward_stamp(run.path / "reward", model, Moment(step, step, made_by))
        if held is not None:  # what was trained is saved by now, whatever printing comes to
            show_measured(rows, path)
        if held is not test and test is not None:
            console.say(f"{len(test)} test rows, by which nothing was chosen:", style="bold")
            show_measured(*measure(test, "test"))
        show_verdict(reward.card, reward.dimensions, str(run.path / "reward"))
        return {}

    watched = validation is not None and config.evaluation.every
    rounds = (watch, partial(keep_report, run.path))
    hooks = [Hook(config.evaluation.every, call) for call in rounds] if watched else []
    return stage.fit(objective, Callbacks(hooks, finish=finish))


def warn_of_incomparable(rewards: Mapping[str, Reward], held: Dataset | None) -> None:
    """Warn of the dimensions that will have no accuracy on the held-out rows, with the reason."""
    if held is None:
        what = "no row has the split validation or test"
        warn(f"{what}: the reward will be saved without an accuracy, its scores as they are")
        return
    asked = dict.fromkeys(name for reward in rewards.values() for name in reward.dimensions)
    for name, reason in reward_eval.incomparable(asked, reward_eval.held_out(held)).items():
        warn(f"there is no accuracy for {name!r}: {reason}")


def measure_reward(
    config: Config,
    rewards: Mapping[str, Reward],
    model: Backbone,
    data: Dataset,
    train: Dataset | None,
    path: Path,
    at: Sequence[reward_eval.Level],
    noise_draws: int = 3,
    **facts: str,
) -> list[reward_eval.Row]:
    """Measure several rewards side by side at some noise levels; the rows go to ``path``.

    train: calibrates the margin under which two scores count as a tie; a few hundred of its samples are enough.
    """
    rows = reward_eval.evaluate(
        {name: build_latents_scorer(reward, model) for name, reward in rewards.items()},
        reward_eval.held_out(data),
        at,
        train=None if train is None else reward_eval.held_out(train).head(256),
        noise_draws=noise_draws,
        progress=progress("measuring the reward at every noise level"),
    )
    if processes.is_main():
        measured = {name: reward_hash(reward) for name, reward in rewards.items()}
        reward_eval.save_rows(path, rows, run=str(config.run), rewards=measured, **facts)
    return rows


def show_measured(rows: Sequence[reward_eval.Row], path: Path, all_measures: bool = False) -> None:
    """Draw plots beside ``path``, where the rows are, and print the accuracies, or all measures as well."""
    dimensions = list(dict.fromkeys(row.dimension for row in rows))
    measures = reward_eval.measured(rows)
    if processes.is_main() and rows:
        for name, measure in measures.items():
            with atomic_write(path.with_suffix(".png" if name == "accuracy" else f".{name}.png")) as temporary:
                temporary.write_bytes(plots.by_sigma(rows, dimensions, measure))
    for name, measure in measures.items():
        if all_measures or name == "accuracy":
            for title, table in tables.ranking_tables(rows, measure).items():
                console.say(title)
                console.print(table)


def show_verdict(measured: RewardCard, dimensions: Iterable[str], where: str) -> None:
    """Say which dimensions rank clearly better than chance and how to follow them; warn of the others.

    where: what the reward is called.
    """
    for doubt in doubts(measured, dimensions):
        warn(f"{where}: {doubt}")
    if measured.accuracy:
        told = advice(measured, dict.fromkeys(dimensions, 1.0))
        console.say(f"{where}: {told}", style="bold")


def warn_of_doubts(reward: Reward, weights: Mapping[str, float], where: str) -> None:
    """Warn of the dimensions that are followed and that a reward does not rank better than chance, or nobody measured.

    weights: of the dimensions that are followed.  where: the yaml key that names the reward.
    """
    members = reward.members if isinstance(reward, RewardEnsemble) else [reward]
    for number, member in enumerate(members):
        name = f"{where} (member {number})" if len(members) > 1 else where
        if member.card is None or not (doubted := doubts(member.card, weights)):
            continue
        for doubt in doubted:
            warn(f"{name}: {doubt}")
        if member.card.accuracy:
            warn(f"{name}: {advice(member.card, weights)}")


@torch.no_grad()
def clean_logits(reward: Reward, model: Backbone, data: Dataset) -> dict[str, torch.Tensor]:
    """Compute the logits of a dataset at sigma 0, which normalise the scores."""
    held = reward_eval.held_out(data)
    score = build_latents_scorer(reward, model)
    parts = []
    for indices in held.batches(64):
        latents, condition = held.get(indices)
        parts.append(score(latents, torch.zeros(len(latents), device=latents.device), condition))
    return {name: torch.cat([part[name] for part in parts]) for name in reward.dimensions}


def card(config: Config, **measured: Any) -> RewardCard:
    """Make the card of a reward: the videos that it was trained on, and what was measured of it."""
    sizes = clip_sizes(config).sizes
    ranges: dict[str, Any] = {}
    for name in ("frames", "fps", "height", "width"):
        values = [getattr(size, name) for size in sizes]
        ranges[name] = (min(values), max(values))
    return RewardCard(**ranges, **measured)
