"""What is trained: a reward from preferences, a policy by SFT or by the gradient of a reward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.config.section import Section
from prfl.config.sections.objective import SftConfig
from prfl.config.sections.reward_gradient import (
    AlignPropConfig,
    DenseProcessConfig,
    DraftLvConfig,
    DrTuneConfig,
    FullChainConfig,
    InstructVideoConfig,
    LeapAlignConfig,
    PrflConfig,
    ReflConfig,
    SftRegulariserConfig,
    VaderConfig,
    inner_node,
)
from prfl.data.dataset import LatentDataset, PairDataset
from prfl.factory.backbone import POLICY, policy_adapter_name
from prfl.factory.by_name import build_by_name
from prfl.factory.data import Dataset
from prfl.factory.experts import of_experts, trained_range
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import Reward, TrainableReward
from prfl.factory.rollout import build_cheaper, build_scale, build_schedule, chain_shift
from prfl.objective import Objective
from prfl.objective.loss import RewardLoss
from prfl.objective.methods.alignprop import AlignProp
from prfl.objective.methods.base import Method
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.draft_lv import DraftLv
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.instructvideo import InstructVideo
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.pixel_preference import PixelPreference
from prfl.objective.preference import Preference
from prfl.objective.reused_rollout import FreshRollout, ReusedRollout
from prfl.objective.reward_gradient import RewardGradient
from prfl.objective.sft import Sft
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.scorer import JointScorer, LatentScorer, PixelScorer
from prfl.reward.several import LatentBeside
from prfl.rollout.guidance import Guidance
from prfl.rollout.solvers import SolverSchedule
from prfl.training.regulariser import Regulariser
from prfl.utils.errors import error_location
from prfl.utils.order import PROMPTS, met


def instruct_video(schedule: SolverSchedule, seed: int, start: float, last_steps: int) -> InstructVideo:
    """start: the share of the chain that is left out."""
    return InstructVideo(schedule, seed, inner_node(start, schedule.steps), last_steps=last_steps)


def full_chain(schedule: SolverSchedule, seed: int) -> Vader:
    return Vader(schedule, seed, last_steps=schedule.steps)


METHODS: dict[type[Section], Callable[..., Method]] = {
    PrflConfig: Prfl,
    ReflConfig: partial(Prfl, handoff="clean"),
    VaderConfig: Vader,
    FullChainConfig: full_chain,
    AlignPropConfig: AlignProp,
    DraftLvConfig: DraftLv,
    DrTuneConfig: DrTune,
    LeapAlignConfig: LeapAlign,
    InstructVideoConfig: instruct_video,
    DenseProcessConfig: DenseProcess,
}
"""The method of every section that follows a reward; it takes the section's keys by name (``build_by_name``)."""


def build_preference(config: Config, model: Backbone, reward: TrainableReward, clips: Dataset) -> Objective:
    settings = config.preference
    assert settings is not None
    with error_location(config.data.clips_key):
        if isinstance(reward, LatentReward):
            return Preference(
                reward,
                clips,
                config.seed,
                loss=settings.loss,
                sigma_sampling=settings.sigma_sampling,
                shift=chain_shift(config, model),
                eta=settings.eta,
            )
        return PixelPreference(
            reward,
            clips,
            model,
            config.seed,
            loss=settings.loss,
            frames=settings.frames,
            eta=settings.eta,
            keep_decoded=settings.keep_decoded,
        )


def build_sft(config: Config, model: Backbone, clips: Dataset) -> Sft:
    """SFT as the objective itself, or as the regulariser of another."""
    regulariser = config.reward_gradient.sft if config.reward_gradient else None
    settings = regulariser or config.objective
    assert isinstance(settings, SftConfig | SftRegulariserConfig), "the config's rules ask for objective.sft"
    assert isinstance(clips, LatentDataset), "check_rows refuses pairs"
    return Sft(
        model,
        clips,
        config.seed,
        adapter=policy_adapter_name(config),
        prompt_dropout=settings.prompt_dropout,
        shift=chain_shift(config, model),
        scale=regulariser.weight if regulariser else 1.0,
        within=trained_range(config, model.facts),
    )


def build_method(config: Config, model: Backbone) -> Method:
    """The method of the config's objective, which must follow a reward.

    Raises PrflError where its steps do not fit the networks that the model has and the policy trains.
    """
    section, schedule = config.objective, build_schedule(config, model)
    method = build_by_name(METHODS[type(section)], section, schedule=schedule, seed=config.seed)
    return of_experts(config, method, model.facts)


def build_rollouts(config: Config) -> FreshRollout | ReusedRollout:
    rollout = config.rollout
    if rollout.gradients_per_rollout == 1:
        return FreshRollout()
    return ReusedRollout(rollout.gradients_per_rollout, config.training.batch, rollout.drift_limit)


def build_scorer(config: Config, model: Backbone, reward: Reward) -> LatentScorer | PixelScorer | JointScorer:
    """How a reward-gradient objective reads its reward."""
    objective, scores = config.reward_gradient, config.reward
    assert objective is not None and scores is not None
    if isinstance(reward, LatentReward | RewardEnsemble):
        return LatentScorer(reward, scores.aggregate)
    if isinstance(reward, LatentBeside):
        latent, pixel = (build_scorer(config, model, member) for member in (reward.latent, reward.pixel))
        assert isinstance(latent, LatentScorer) and isinstance(pixel, PixelScorer)
        return JointScorer(latent, pixel)
    context = {"reward": reward, "backbone": model, "seed": config.seed, "aggregate": scores.aggregate}
    return build_by_name(PixelScorer, objective, **context)


def drawn_prompts(config: Config) -> list[str]:
    """The training prompts that this run's chains start with: a short run on a long list needs few of them."""
    prompts, samples = load_prompts(config.data)["train"], config.training.steps * config.training.batch
    return [prompts[index] for index in met(samples, len(prompts), config.seed, PROMPTS)]


def build_reward_gradient(config: Config, model: Backbone, reward: Reward, clips: Dataset | None) -> RewardGradient:
    """A reward-gradient objective: (method, reward), whatever the two are.  clips: for chains that start from data."""
    objective, scores, guidance = config.reward_gradient, config.reward, config.rollout.guidance
    assert objective is not None and scores is not None
    with error_location("data"):
        latent_shape = model.latent_shape(config.data.frames, config.data.height, config.data.width)
    starts = clips if objective.starts_from_data else None
    assert not isinstance(starts, PairDataset), "check_rows refuses pairs"
    return RewardGradient(
        model,
        build_method(config, model),
        build_scorer(config, model, reward),
        RewardLoss(
            scores.weights or dict.fromkeys(reward.dimensions, 1.0),
            aggregate=scores.aggregate,
            shape=scores.shape,
            target=scores.target,
            scale=scores.scale,
        ),
        load_prompts(config.data)["train"],
        latent_shape,
        adapter=POLICY,
        guidance=Guidance(build_scale(guidance.scale, guidance.first_frame), guidance.gradient),
        distance_weight=objective.distance_weight,
        step_weight=config.rollout.step_weight,
        clips=starts,
        reward_batch=scores.batch,
        stride=config.rollout.stride,
        rollouts=build_rollouts(config),
        cheaper=build_cheaper(config),
        expected=drawn_prompts(config),
    )


def build_regulariser(config: Config, model: Backbone, clips: Dataset | None) -> Regulariser | None:
    objective = config.reward_gradient
    if objective is None or objective.sft is None:
        return None
    assert clips is not None
    return Regulariser(build_sft(config, model, clips), every=objective.sft.every)
