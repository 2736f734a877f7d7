"""Checks and settings of a config for a model of two networks that take turns along the chain."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from prfl.backbone import Facts
from prfl.backbone.experts import HIGH, LOW, expert_networks, highest_read, is_high, loras_by_network, lowest_of_high
from prfl.backbone.families import FAMILIES
from prfl.config.schema import Config
from prfl.config.sections.experts import LoraOfEach, RateOfEach, ScaleOfEach, loras_of
from prfl.objective.methods.base import Method
from prfl.objective.methods.of_experts import OfExperts, sigma_of
from prfl.rollout.solvers import SolverSchedule
from prfl.utils.console import warn
from prfl.utils.errors import PrflError, error_location

INIT = "backbone.adapter.init"


def trained_experts(config: Config, facts: Facts) -> list[str]:
    """Which of two experts the policy trains, high before low; empty for a model that has none."""
    chosen = config.backbone.experts.train if config.backbone.experts else list(expert_networks(facts))
    return [name for name in expert_networks(facts) if name in chosen]


def trained_networks(config: Config, facts: Facts) -> list[str] | None:
    """The networks that the policy trains; None where that is not asked."""
    return [expert_networks(facts)[name] for name in trained_experts(config, facts)] or None


def trained_sigma(config: Config, facts: Facts) -> float:
    """A noise level at which a network predicts that is trained."""
    if facts.boundary is None:
        return 0.5
    return 1.0 if trained_experts(config, facts) == [HIGH] else facts.boundary / 2


def trained_range(config: Config, facts: Facts) -> tuple[float, float]:
    """The lowest and the highest noise level at which a network predicts that is trained."""
    trained = trained_experts(config, facts)
    lowest = lowest_of_high(facts) if trained == [HIGH] else 0.0
    return lowest, highest_read(facts) if trained == [LOW] else 1.0


def one_resident(config: Config) -> bool:
    """Whether one expert's frozen weights are on the device at a time."""
    return config.backbone.experts is not None and config.backbone.experts.resident == "one"


def lora_of_config(lora: Path | LoraOfEach | None) -> Path | dict[str, Path] | None:
    """The LoRA that a key names: one file, or one of each expert by its name."""
    return loras_of(lora) if isinstance(lora, LoraOfEach) else lora


def expert_at(facts: Facts, sigma: float) -> str:
    return HIGH if bool(is_high(facts, torch.tensor(sigma, dtype=torch.float64))) else LOW


def check_experts(config: Config, facts: Facts) -> None:
    """Raise PrflError for what is of two experts where the model has one network, and what is of one not trained."""
    check_loras(config, facts)
    rate, of_each = config.training.learning_rate, (ScaleOfEach, RateOfEach)
    asked = {
        "backbone.experts": config.backbone.experts is not None,
        "training.learning_rate": isinstance(rate, of_each),
        "rollout.guidance.scale": isinstance(config.rollout.guidance.scale, of_each),
        "evaluation.guidance_scale": isinstance(config.evaluation.guidance_scale, of_each),
    }
    if facts.boundary is None:
        for key in (key for key, there in asked.items() if there):
            what = f"{facts.model_id} has one network, and no experts for high and low noise"
            raise PrflError(what, where=key, fix="leave it out" if key == "backbone.experts" else "give one number")
        return
    if one_resident(config):
        check_turns(config)
    if config.trains_reward:
        check_reward_training(config)
        return
    trained = trained_experts(config, facts)
    if isinstance(rate, RateOfEach) and len(trained) == 1:
        what = f"the {trained[0]}-noise expert alone is trained (backbone.experts.train)"
        raise PrflError(what, where="training.learning_rate", fix=f"give one number, as {getattr(rate, trained[0]):g}")


def check_loras(config: Config, facts: Facts) -> None:
    """Raise PrflError for a LoRA file that is of no network, or is to be trained on where its expert is not."""
    loras, form = config.backbone.loras, FAMILIES[facts.family].lora
    for key, lora in loras.items():
        named = lora_of_config(lora)
        if named is not None:
            with error_location(key):
                loras_by_network(named, form)
        warn_of_exchanged(key, loras_of(lora))
    trained = trained_experts(config, facts)
    for expert in loras_of(loras[INIT]):
        if expert and expert not in trained:
            what = f"the {trained[0]}-noise expert alone is trained (backbone.experts.train)"
            fix = f"leave it out, or keep the file frozen in the base: backbone.base_lora.{expert}"
            raise PrflError(what, where=f"{INIT}.{expert}", fix=fix)


def warn_of_exchanged(key: str, files: Mapping[str, Path]) -> None:
    """Warn of a file that by its name is of the other expert: both have the same layers, so nothing else shows it."""
    for expert, file in files.items():
        told = [
            name for name in (HIGH, LOW) if re.search(rf"(?<![a-z]){name}([-_ ]?noise|(?![a-z]))", file.stem.lower())
        ]
        if expert and told not in ([], [expert], [HIGH, LOW]):
            warn(f"{key}.{expert}: by its name {file.name} is of the {told[0]}-noise expert")


def check_turns(config: Config) -> None:
    """Raise PrflError for what cannot be where weights come and go."""
    where, settings = "backbone.experts.resident", config.backbone
    if settings.train == "full":
        what = "all weights are trained, and one expert's frozen weights are to be on the device at a time"
        raise PrflError(what, where=where, fix="resident: both, or train: lora with an adapter")
    if settings.checkpointing == "none" and not config.trains_reward:
        what = "a graph that is not checkpointed would refer to weights that have been swapped"
        raise PrflError(what, where=where, fix="resident: both, or backbone.checkpointing: full")
    if settings.compile:
        what = "compiled blocks do not wait for their weights"
        raise PrflError(what, where=where, fix="resident: both, or compile: false")


def check_reward_training(config: Config) -> None:
    """Raise PrflError for a rate of each expert where a head is trained, which reads one of them."""
    if isinstance(config.training.learning_rate, RateOfEach):
        what = "a head is trained, and no expert"
        raise PrflError(what, where="training.learning_rate", fix="give one number")


def of_experts(config: Config, method: Method, facts: Facts) -> Method:
    """The method, whose plans train the experts that the config names.

    Raises PrflError for a step of the run that trains none of them, or reads a reward where no reward can be read.
    """
    if facts.boundary is None:
        return method
    trained = trained_experts(config, facts)
    chosen = OfExperts(method, lambda sigma: expert_at(facts, sigma) in trained)
    for step in range(config.training.steps):
        check_trains(step, chosen, facts, trained)
        check_reads(step, chosen, facts)
    return chosen


def check_trains(step: int, chosen: OfExperts, facts: Facts, trained: list[str]) -> None:
    """Raise PrflError for a step that trains neither of the experts that are trained."""
    if chosen.plan(step).plan.trains:
        return
    schedule, share = chosen.schedule, share_of_high(chosen.schedule, facts)
    highest = max(sigma_of(schedule, k) for k in chosen.method.plan(step).plan.trains)
    other = LOW if trained == [HIGH] else HIGH
    what = f"step {step} of the run trains at sigma {highest:.3g} alone, where the {other}-noise expert predicts"
    part = [cut(share), 1.0] if other == HIGH else [0.0, cut(share, up=False)]
    fix = f"objective.steps_range: {part}, where the method has it, full_chain, or train: [high, low]"
    raise PrflError(what, where="backbone.experts.train", fix=fix)


def check_reads(step: int, chosen: OfExperts, facts: Facts) -> None:
    """Raise PrflError for a step that reads the reward where the expert for high noise predicts."""
    step_plan, schedule = chosen.plan(step), chosen.schedule
    highest = max(step_plan.sigma(node) for node in step_plan.seeds)
    if expert_at(facts, highest) == LOW:
        return
    what = f"step {step} of the run reads the reward at sigma {highest:.3g}, and a reward reads the low-noise expert, "
    what += f"below {facts.boundary:g}"
    part = [cut(share_of_high(schedule, facts) - 1 / schedule.steps), 1.0]
    fix = f"where the method has it objective.steps_range: {part}, or handoff: clean, which trains all steps; or "
    fix += "full_chain, whose gradient goes from the chain's end to the high-noise expert"
    raise PrflError(what, where="objective", fix=fix)


def share_of_high(schedule: SolverSchedule, facts: Facts) -> float:
    """The share of the chain's steps at which the expert for high noise predicts."""
    return [expert_at(facts, float(sigma)) for sigma in schedule.sigmas].index(LOW) / schedule.steps


def cut(share: float, up: bool = True) -> float:
    """A share of the chain in three digits, rounded so that it takes in no step more."""
    return (math.ceil(share * 1000 - 1e-6) if up else math.floor(share * 1000 + 1e-6)) / 1000
