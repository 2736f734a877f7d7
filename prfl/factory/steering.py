"""Steered sampling of a config: its method, its chain, and the rewards that it looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from prfl.backbone import Backbone
from prfl.backbone.condition import stand_in
from prfl.config.schema import Config
from prfl.config.section import Section
from prfl.config.sections.steering import (
    BeamSearchConfig,
    BestOfConfig,
    DoitConfig,
    FkConfig,
    GuidedSamplingConfig,
    LatSearchConfig,
    NoiseSearchConfig,
    SteeringBase,
    SteeringRewardConfig,
    SvddConfig,
    TreeSearchConfig,
)
from prfl.factory.backbone import build_architecture
from prfl.factory.by_name import build_by_name
from prfl.factory.data import video_size
from prfl.factory.evaluation import sampling_settings
from prfl.factory.reward import Reward, load_followed_reward, load_reward
from prfl.reward.checkpoint import check_clip
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.rollout.sampling import SamplingSettings
from prfl.rollout.solvers import SOLVERS, SolverSchedule
from prfl.steering.best_of import BestOf
from prfl.steering.budget import Method, calls_of, within
from prfl.steering.calls import Calls
from prfl.steering.dlbs import BeamSearch
from prfl.steering.doit import Doit
from prfl.steering.dts import TreeSearch
from prfl.steering.fk import FkSteering
from prfl.steering.guidance import GuidedSampling
from prfl.steering.latsearch import LatSearch
from prfl.steering.looks import latent_look, pixel_look
from prfl.steering.noise import NoiseSearch
from prfl.steering.process import Look
from prfl.steering.sampling import prices_of
from prfl.steering.svdd import Svdd
from prfl.utils.errors import PrflError

METHODS: dict[type[Section], Callable[..., Method]] = {
    BestOfConfig: BestOf,
    SvddConfig: Svdd,
    FkConfig: FkSteering,
    BeamSearchConfig: BeamSearch,
    GuidedSamplingConfig: GuidedSampling,
    TreeSearchConfig: TreeSearch,
    LatSearchConfig: LatSearch,
    DoitConfig: Doit,
    NoiseSearchConfig: NoiseSearch,
}
"""The method of every section; it takes the section's keys by name (``build_by_name``)."""


@dataclass(frozen=True)
class Steering:
    """All that a run of steered samples is made of but the model, the policy and the prompts.

    calls: of one video, before it is drawn.  whole: of as many chains that are compared at their ends.
    """

    method: Method
    settings: SamplingSettings
    schedule: SolverSchedule
    looks: list[Look]
    decode_price: float
    calls: Calls
    whole: Calls


def build_steering(config: Config, model: Backbone) -> Steering:
    """Everything of ``steering``.  Raises PrflError for a reward that is not there, and a budget that is too small."""
    section = config.steering
    assert section is not None
    settings, looks = sampling_settings(config), build_looks(config, model)
    schedule = steering_schedule(section, settings, model)
    decode = decode_price(config) if any(look.decodes for look in looks) else 0.0  # counting takes a second
    prices = prices_of(model.facts, settings.guidance_scale, decode)
    method = build_by_name(METHODS[type(section)], section)
    if section.budget is not None:
        method = within(section.budget, method, schedule, looks, prices)
    calls = calls_of(method, schedule, looks, prices)
    whole = calls_of(BestOf(method.chains, method.keep, (1.0,)), schedule, looks, prices)
    return Steering(method, settings, schedule, looks, prices.decode, calls, whole)


def steering_schedule(section: SteeringBase, settings: SamplingSettings, model: Backbone) -> SolverSchedule:
    """The chain: the evaluation's sigmas, with the solver of the section."""
    shape = model.latent_shape(settings.frames, settings.height, settings.width)
    sigmas = model.sigmas(settings.steps, shape, settings.shift)
    return build_by_name(SOLVERS[section.chosen_solver or settings.solver], section, sigmas=sigmas)


def build_looks(config: Config, model: Backbone) -> list[Look]:
    """The rewards that steer: those of the section, or the one that the config follows or has trained.

    Raises PrflError for ``final_levels`` where none of them reads latents.
    """
    assert config.steering is not None
    looks, levels = _looks(config, model), tuple(config.steering.final_levels)
    if levels and all(look.clean for look in looks):
        what, fix = "none of the rewards that steer reads latents", "leave it out, or let a latent reward steer"
        raise PrflError(what, where="steering.final_levels", fix=fix)
    return [look if look.clean else replace(look, levels=levels) for look in looks]


def _looks(config: Config, model: Backbone) -> list[Look]:
    assert config.steering is not None
    if config.steering.rewards is not None:
        return [_named_look(number, each, config, model) for number, each in enumerate(config.steering.rewards)]
    if config.follows_reward:
        assert config.reward is not None
        reward = load_followed_reward(config, model)
        return [look_of(reward, model, config.reward.weights, config.reward.aggregate)]
    trained = load_reward(config.run / "reward", model)
    labels = config.preference is not None and config.preference.loss == "bce"
    return [look_of(trained, model, aggregate="logsigmoid" if labels else "sum")]


def _named_look(number: int, named: SteeringRewardConfig, config: Config, model: Backbone) -> Look:
    reward = load_reward(named.path, model, adapter_name=f"steering-{number}")
    check_clip(reward.card, video_size(config.data), named.path)
    return replace(look_of(reward, model, named.weights, named.aggregate), weight=named.weight)


def look_of(reward: Reward, model: Backbone, weights: dict[str, float] | None = None, aggregate: str = "sum") -> Look:
    if isinstance(reward, LatentReward | RewardEnsemble):
        return latent_look(reward, weights, aggregate)  # type: ignore[arg-type] # the config's literal
    return pixel_look(reward, model, weights, aggregate)  # type: ignore[arg-type]


def decode_price(config: Config) -> float:
    """Decoding one video, in network calls of one sample: the ratio of their operations, counted without weights."""
    model, size = build_architecture(config), video_size(config.data)
    state = model.latent_shape(size.frames, size.height, size.width)
    latents = torch.empty(1, *state, dtype=model.facts.dtype, device="meta")
    sigma = torch.empty(1, device="meta")
    condition = stand_in(model.facts.condition, 1, model.facts.text_tokens, state, partial(torch.empty, device="meta"))
    counts = []
    for work in (lambda: model.decode(latents), lambda: model.velocity(latents, sigma, condition)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    decode, velocity = counts
    return decode / velocity
