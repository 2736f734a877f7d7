"""Rewards measured side by side at every noise level, or a policy beside its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prfl.backbone import Backbone
from prfl.backbone.experts import highest_read
from prfl.config.schema import Config
from prfl.data.prompts import plain
from prfl.evaluation import reward_eval
from prfl.factory.backbone import build_backbone
from prfl.factory.data import Dataset, build_dataset, cached_dataset, encode_manifest, encode_prompts, fill_cache
from prfl.factory.evaluation import watched_rewards
from prfl.factory.policy import finished_run_config, load_policy
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_followed_reward, load_reward
from prfl.factory.rollout import chain_sigmas
from prfl.reward import RewardCard
from prfl.runs.outcomes import compare_base, show_report
from prfl.runs.train_reward import measure_reward, show_measured, show_verdict, warn_of_incomparable
from prfl.training.run_folder import RunFolder
from prfl.utils.console import progress, warn
from prfl.utils.errors import PrflError
from prfl.utils.lock import folder_lock


def evaluate(
    config: Config | None,
    *,
    run: Path | None = None,
    overrides: Sequence[str] = (),
    heads: Mapping[str, Path] | None = None,
    manifest: Path | None = None,
    split: str = "validation",
) -> None:
    """Measure trained rewards, side by side, at every noise level; or a trained policy beside its base.

    run: a finished run's folder, in place of a config; None is that of the first head.  overrides: keys of the run's
    config to change.  heads: saved rewards by name; none is the one that the config trained.
    manifest: other labelled videos, all of them held out (out of domain, say); None is a split of the config's.
    """
    if config is None:
        folder = run or next(iter(heads.values() if heads else [])).parent
        config = finished_run_config(folder, overrides)
    with folder_lock(config.run):
        evaluate_in_run(config, heads, manifest, split)


def evaluate_in_run(config: Config, heads: Mapping[str, Path] | None, manifest: Path | None, split: str) -> None:
    model = build_backbone(config)
    if heads is None and manifest is None and not config.trains_reward:
        return evaluate_policy(config, model)
    folders = heads or {"head": config.run / "reward"}
    rewards = {
        name: load_reward(folder, model, adapter_name=f"reward-{number}")
        for number, (name, folder) in enumerate(folders.items())
    }

    # The clips: those of the config, and the held-out ones, which may be another manifest's.
    train = None  # its samples say how far apart two scores are still a tie
    if manifest is None or config.reads_clips:
        path = fill_cache(config, model, progress("generated clips"))
        train = build_dataset(config, model, path, "train")
    if manifest is None:
        held = build_dataset(config, model, path, split)
    else:
        path = manifest
        encode_manifest(config, model, path)
        held = cached_dataset(config, model, path)
    if held is None:
        fix = f'add "split": "{split}" to the held-out rows; --split says which of validation and test is measured'
        raise PrflError("there are no held-out rows", where=str(path), fix=fix)
    if train is not None and manifest is not None:
        warn_of_trained(held, train, manifest)

    # The measures, at the noise levels of the rollout among others.
    of_split = config.run / ("reward_eval-test.json" if split == "test" else "reward_eval.json")
    results = of_split if manifest is None else reward_eval.results_of(config.run, manifest)
    every = reward_eval.levels(chain_sigmas(config, model).tolist())
    at = reward_eval.up_to(every, highest_read(model.facts))
    warn_of_incomparable(rewards, held)
    measured = measure_reward(config, rewards, model, held, train, results, at, clips=str(path))
    show_measured(measured, results, all_measures=True)
    for name, reward in rewards.items():
        ranks = RewardCard(**reward_eval.measured_card(measured, name))
        show_verdict(ranks, [dimension for dimension in reward.dimensions if dimension in ranks.accuracy], name)
    show_report(config.run)


def warn_of_trained(held: Dataset, train: Dataset, manifest: Path) -> None:
    """Warn of rows of another manifest, all of them held out, that the reward was trained on."""
    videos = len(held.entries & train.entries)
    trained = {plain(prompt) for prompt in train.prompts}
    prompts = [prompt for prompt in dict.fromkeys(held.prompts) if plain(prompt) in trained]
    if videos or prompts:
        example = f", as {prompts[0][:60]!r}" if prompts else ""
        warn(f"{manifest}: {videos} videos and {len(prompts)} prompts are among those of the training{example}")


def evaluate_policy(config: Config, model: Backbone) -> None:
    """Draw base and policy on the test prompts again: samples/final and the report, as at the end of the training."""
    load_policy(config, model)
    if not config.evaluation.final_samples:
        fix = "say how many samples: evaluation.final_samples=64"
        raise PrflError("there are no samples to measure", where="evaluation.final_samples", fix=fix)
    encode_prompts(config, model, load_prompts(config.data)["test"], progress("encoding the prompts"))
    reward = load_followed_reward(config, model) if config.follows_reward else None
    compare_base(config, model, watched_rewards(config, model, reward), RunFolder(config.run))
    show_report(config.run)
