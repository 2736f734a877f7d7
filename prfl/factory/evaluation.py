"""The parts of an evaluation: a judge, sampling settings, and rewards as scorers of noisy latents."""

from __future__ import annotations

from typing import Literal

import torch

from prfl.backbone import Backbone, Condition
from prfl.config.schema import Config
from prfl.config.sections.evaluation import EvaluationConfig
from prfl.evaluation.judge import Judge
from prfl.evaluation.reward_eval import Scorer as LatentsScorer
from prfl.evaluation.reward_eval import pixel_scorer
from prfl.factory.by_name import build_by_name
from prfl.factory.critic import load_critic
from prfl.factory.data import video_size
from prfl.factory.reward import Reward, load_reward
from prfl.factory.rollout import build_scale
from prfl.reward.checkpoint import check_clip
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.own_function import load_own
from prfl.reward.scores import Scores, total
from prfl.reward.several import LatentBeside
from prfl.rollout.sampling import SamplingSettings
from prfl.toy import clips as shapes


def build_judge(config: EvaluationConfig) -> Judge | None:
    return shapes.judge if config.judge == "shapes" else None


def sampling_settings(config: Config) -> SamplingSettings:
    """How videos are drawn for evaluation."""
    evaluation = config.evaluation
    return SamplingSettings(
        frames=config.data.frames,
        height=config.data.height,
        width=config.data.width,
        steps=evaluation.steps or config.rollout.steps,
        shift=config.rollout.shift,
        solver=config.rollout.sampling_solver,
        guidance_scale=build_scale(evaluation.guidance_scale, evaluation.guidance_first_frame),
        batch=evaluation.batch,
        seed=evaluation.seed,
    )


def watched_rewards(config: Config, model: Backbone, trained: Reward | None) -> dict[str, LatentsScorer]:
    """The ``reward`` that is trained on, and the ``held_out`` one: what is watched on held-out prompts."""
    scorers: dict[str, LatentsScorer] = {}
    if trained is not None and config.reward is not None:
        scorers["reward"] = with_total(trained, model, config.reward.weights, config.reward.aggregate)
    if config.evaluation.held_out_reward:
        held_out = load_reward(config.evaluation.held_out_reward, model, adapter_name="held-out")
        check_clip(held_out.card, video_size(config.data), config.evaluation.held_out_reward)
        scorers["held_out"] = with_total(held_out, model, None, "sum")
    if section := config.evaluation.held_out_critic:
        critic = build_by_name(load_critic, section, device=model.facts.device, data=config.data)
        scorers["held_out"] = with_total(critic, model, None, "logsigmoid")
    if judge := config.evaluation.held_out_callable:
        watcher = load_own(judge.function, judge.options, judge.differentiable, model.facts.device, where=judge.key)
        scorers["held_out"] = with_total(watcher, model, None, "sum")
    return scorers


def with_total(
    reward: Reward, model: Backbone, weights: dict[str, float] | None, aggregate: Literal["sum", "logsigmoid"]
) -> LatentsScorer:
    """A reward's logits, and their ``total`` as an objective with these weights takes it."""
    read = build_latents_scorer(reward, model)

    def score(latents: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> Scores:
        logits = read(latents, sigma, condition)
        if aggregate == "logsigmoid":
            scores = logits
        elif isinstance(reward, RewardEnsemble):  # each member has its own normalisation
            scores = reward(latents, sigma, condition)
        else:
            scores = reward.normalisation.apply(logits)
        counted = weights or dict.fromkeys(reward.dimensions, 1.0)
        return logits | {"total": total(scores, counted, aggregate)}

    return score


def build_latents_scorer(reward: Reward, model: Backbone) -> LatentsScorer:
    """Logits of a reward at noisy latents, for evaluation."""
    if isinstance(reward, LatentBeside):
        latent, pixel = reward.latent.logits, pixel_scorer(model, reward.pixel)
        return lambda latents, sigma, condition: latent(latents, sigma, condition) | pixel(latents, sigma, condition)
    return reward.logits if isinstance(reward, LatentReward | RewardEnsemble) else pixel_scorer(model, reward)
