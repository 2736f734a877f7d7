"""A stage that trains a policy: SFT, or the gradient of a reward."""

from __future__ import annotations

from functools import partial

from prfl.config.sections.evaluation import FEWEST_PROMPTS
from prfl.factory.data import encode_prompts
from prfl.factory.evaluation import watched_rewards
from prfl.factory.objective import build_regulariser, build_reward_gradient, build_sft
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import Reward, followed_weights, load_followed_reward
from prfl.objective import Objective
from prfl.runs.callbacks import StopOnHacking, Validation, save_best
from prfl.runs.early_stopping import BestPolicy
from prfl.runs.outcomes import compare_base, keep_report, prompts_of
from prfl.runs.stage_run import StageRun
from prfl.runs.train_reward import warn_of_doubts
from prfl.training.loop import Callbacks, Hook, TrainResult
from prfl.utils.console import progress
from prfl.utils.errors import PrflError


def train_policy(stage: StageRun) -> TrainResult:
    """Train by SFT or a reward-gradient method, with rounds on validation prompts.

    At the end base and policy are compared on the test prompts.
    """
    config, model, evaluation = stage.config, stage.model, stage.config.evaluation
    check_enough_prompts(stage)
    encode_prompts(config, model, prompts_of(config), progress("encoding the prompts"))
    objective, reward = objective_of(stage)
    rewards = watched_rewards(config, model, reward)

    # What happens between the steps.
    best = BestPolicy(config, model, stage.folder, stage.run_id) if evaluation.keep_best else None
    hooks = []
    if evaluation.every:
        validation = Validation(stage, rewards, best)
        hooks.append(Hook(evaluation.every, validation, at_start=True))
        hooks.append(Hook(evaluation.every, partial(keep_report, stage.folder.path), at_start=True))
        if evaluation.stop_on_hacking:
            hooks.append(Hook(evaluation.every, StopOnHacking(stage, validation)))

    def finish(step: int) -> dict[str, float]:
        save_best(stage, best, step)
        if evaluation.final_samples:
            compare_base(config, model, rewards, stage.folder)
        return {}

    callbacks = Callbacks(hooks, best.patience_is_over if best else None, finish)
    return stage.fit(objective, callbacks, build_regulariser(config, model, stage.clips))


def objective_of(stage: StageRun) -> tuple[Objective, Reward | None]:
    """Return what is trained, and the reward that it follows, if any."""
    config, model = stage.config, stage.model
    if not config.follows_reward:
        assert stage.clips is not None
        return build_sft(config, model, stage.clips), None
    reward = load_followed_reward(config, model)
    warn_of_doubts(reward, followed_weights(config, reward), "reward.path")
    return build_reward_gradient(config, model, reward, stage.clips), reward


def check_enough_prompts(stage: StageRun) -> None:
    """Raises PrflError where stop_on_hacking would compare too few prompts to tell a fall from chance."""
    if not stage.config.evaluation.stop_on_hacking:
        return
    validation = load_prompts(stage.config.data)["validation"]
    if len(validation) < FEWEST_PROMPTS:
        what = f"stop_on_hacking compares {FEWEST_PROMPTS} prompts or more, and there are {len(validation)}"
        raise PrflError(what, where="data.prompts.validation", fix="give more, or evaluation.stop_on_hacking=false")
