"""What is trained: a reward from preferences, a policy by SFT or by the gradient of a reward."""

from __future__ import annotations

from prfl.backbone import Backbone
from prfl.config.objective_schema import (
    AlignPropConfig,
    DenseProcessConfig,
    DraftLvConfig,
    DrTuneConfig,
    FromDataConfig,
    FullChainConfig,
    InstructVideoConfig,
    LeapAlignConfig,
    PrflConfig,
    ReflConfig,
    SftRegulariserConfig,
    SteeringConfig,
    VaderConfig,
    inner_node,
)
from prfl.config.schema import Config, PreferenceConfig, SftConfig
from prfl.data.dataset import PairDataset
from prfl.factory.backbone import POLICY, build_cheaper, build_schedule, chain_shift, policy_adapter_name
from prfl.factory.data import Dataset, load_prompts
from prfl.factory.reward import Reward, TrainableReward
from prfl.objective import Objective
from prfl.objective.methods.alignprop import AlignProp
from prfl.objective.methods.dense_process import DenseProcess
from prfl.objective.methods.draft_lv import DraftLv
from prfl.objective.methods.drtune import DrTune
from prfl.objective.methods.instructvideo import InstructVideo
from prfl.objective.methods.leapalign import LeapAlign
from prfl.objective.methods.prfl import Prfl
from prfl.objective.methods.vader import Vader
from prfl.objective.preference import PixelPreference, Preference
from prfl.objective.reused_rollout import ReusedRollout
from prfl.objective.reward_gradient import Guidance, Method, RewardGradient
from prfl.objective.scorer import LatentScorer, PixelScorer, RewardLoss
from prfl.objective.sft import Sft
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.rollout.solvers import SolverSchedule
from prfl.training.regulariser import Regulariser
from prfl.utils.errors import PrflError, error_location
from prfl.utils.order import PROMPTS, met


def build_preference(config: Config, model: Backbone, reward: TrainableReward, clips: Dataset) -> Objective:
    own = config.objective
    assert isinstance(own, PreferenceConfig)
    with error_location(clips_key(config)):
        if isinstance(reward, LatentReward):
            return Preference(
                reward,
                clips,
                config.seed,
                loss=own.loss,
                sigma_sampling=own.sigma_sampling,
                shift=chain_shift(config, model),
                eta=own.eta,
            )
        kept = own.keep_decoded
        return PixelPreference(
            reward, clips, model, config.seed, loss=own.loss, frames=own.frames, eta=own.eta, keep_decoded=kept
        )


def clips_key(config: Config) -> str:
    """The key that the config's clips come from."""
    return "data.generator" if config.data.generator else "data.manifest"


def build_sft(config: Config, model: Backbone, clips: Dataset) -> Sft:
    """SFT as the objective itself, or as the regulariser of another."""
    own = config.objective
    settings = own if isinstance(own, SftConfig) else own.sft if isinstance(own, SteeringConfig) else None
    assert settings is not None, "the config's rules ask for objective.sft"
    if isinstance(clips, PairDataset):
        what = "SFT trains on videos, not on pairs"
        raise PrflError(what, where=clips_key(config), fix="give a manifest of videos")
    return Sft(
        model,
        clips,
        config.seed,
        adapter=policy_adapter_name(config),
        prompt_dropout=settings.prompt_dropout,
        shift=chain_shift(config, model),
        scale=settings.weight if isinstance(settings, SftRegulariserConfig) else 1.0,
    )


def build_method(config: Config, schedule: SolverSchedule) -> Method:
    own, seed = config.objective, config.seed
    match own:
        case PrflConfig():
            return Prfl(schedule, seed, handoff=own.handoff, steps_range=own.steps_range, from_data=own.from_data)
        case ReflConfig():
            return Prfl(schedule, seed, handoff="clean", steps_range=own.steps_range)
        case VaderConfig():
            return Vader(schedule, last_steps=own.last_steps)
        case FullChainConfig():
            return Vader(schedule, last_steps=schedule.steps)
        case AlignPropConfig():
            return AlignProp(schedule, seed, last_steps=own.last_steps)
        case DraftLvConfig():
            return DraftLv(schedule, copies=own.copies)
        case DrTuneConfig():
            return DrTune(
                schedule, seed, trained_steps=own.trained_steps, spacing=own.spacing, early_stop=own.early_stop
            )
        case LeapAlignConfig():
            return LeapAlign(schedule, seed, alpha=own.alpha, similarity_floor=own.similarity_floor)
        case InstructVideoConfig():
            return InstructVideo(schedule, inner_node(own.start, schedule.steps), last_steps=own.last_steps)
        case DenseProcessConfig():
            return DenseProcess(
                schedule, seed, rewards=own.rewards, handoff=own.handoff, credit=own.credit, beta=own.beta,
                steps_range=own.steps_range, from_data=own.from_data,
            )  # fmt: skip
    raise AssertionError(f"objective {own.name} follows no reward")


def build_reuse(config: Config) -> ReusedRollout | None:
    own = config.rollout
    if own.gradients_per_rollout == 1:
        return None
    return ReusedRollout(own.gradients_per_rollout, config.training.batch, own.drift_limit)


def build_scorer(config: Config, model: Backbone, reward: Reward) -> LatentScorer | PixelScorer:
    """How a reward-gradient objective reads its reward."""
    own, scores = config.objective, config.reward
    assert isinstance(own, SteeringConfig) and scores is not None
    if isinstance(reward, LatentReward | RewardEnsemble):
        return LatentScorer(reward, scores.aggregate)
    decay = own.temporal_decay if isinstance(own, InstructVideoConfig) else None
    return PixelScorer(reward, model, config.seed, own.frames, scores.aggregate, decay)


def drawn_prompts(config: Config) -> list[str]:
    """The training prompts that this run's chains start with: a short run on a long list needs few of them."""
    known, samples = load_prompts(config.data.prompts)["train"], config.training.steps * config.training.batch
    return [known[place] for place in met(samples, len(known), config.seed, PROMPTS)]


def build_reward_gradient(config: Config, model: Backbone, reward: Reward, clips: Dataset | None) -> RewardGradient:
    """A reward-gradient objective: (method, reward), whatever the two are.  clips: for chains that start from data."""
    own, scores, guidance = config.objective, config.reward, config.rollout.guidance
    assert isinstance(own, SteeringConfig) and scores is not None
    with error_location("data"):
        latent_shape = model.latent_shape(config.data.frames, config.data.height, config.data.width)
    from_data = isinstance(own, InstructVideoConfig) or (isinstance(own, FromDataConfig) and own.from_data > 0)
    starts = clips if from_data else None
    if isinstance(starts, PairDataset):
        what = f"objective {own.name} starts from videos, not from pairs"
        raise PrflError(what, where=clips_key(config), fix="give a manifest of videos")
    return RewardGradient(
        model,
        build_method(config, build_schedule(config, model)),
        build_scorer(config, model, reward),
        RewardLoss(
            scores.weights or dict.fromkeys(reward.dimensions, 1.0),
            aggregate=scores.aggregate,
            shape=scores.shape,
            target=scores.target,
            scale=scores.scale,
        ),
        load_prompts(config.data.prompts)["train"],
        latent_shape,
        config.seed,
        adapter=POLICY,
        guidance=Guidance(guidance.scale, guidance.gradient),
        distance_weight=own.distance_weight,
        step_weight=config.rollout.step_weight,
        clips=starts,
        reward_batch=scores.batch,
        stride=config.rollout.stride,
        reuse=build_reuse(config),
        cheaper=build_cheaper(config),
        expected=drawn_prompts(config),
    )


def build_regulariser(config: Config, model: Backbone, clips: Dataset | None) -> Regulariser | None:
    own = config.objective
    if isinstance(own, SteeringConfig) and own.sft is not None:
        assert clips is not None
        return Regulariser(build_sft(config, model, clips), every=own.sft.every)
    return None
