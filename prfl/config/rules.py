"""Checks the rules that a config must keep: those of each section, and those between rollout, reward and objective.

Every broken rule is reported with the yaml path of the key to change.
"""

from __future__ import annotations

from collections.abc import Iterator

from prfl.config.messages import tag_of
from prfl.config.schema import Config
from prfl.config.section import Fault, kinds
from prfl.config.sections.reward_gradient import RewardGradientConfig
from prfl.config.sections.rollout import SOLVERS, CheaperConfig


def conflicts(config: Config) -> Iterator[Fault]:
    """Yield (yaml path, what is wrong there) of every broken rule."""
    for section in (config.data, config.rollout, config.evaluation, config.backbone):
        yield from section.conflicts(config)
    if objective := config.reward_gradient:
        yield from _rollout(config, objective)
    if what := _unfit_reward(config):
        yield "reward", what
    elif config.reward:
        yield from config.reward.conflicts(config)
    yield from config.objective.conflicts(config)
    yield from config.training.conflicts(config)
    if config.steering:
        yield from config.steering.conflicts(config)


def _unfit_reward(config: Config) -> str:
    """Say why the objective cannot use the reward section as it is; "" if it can."""
    reward, name = config.reward, config.objective.name
    if config.trains_reward and (reward is None or not reward.head_dimensions or reward.paths):
        return f"objective {name} trains a new reward: give reward.head and no reward.path"
    if config.follows_reward and (reward is None or reward.head_dimensions or not (reward.paths or reward.public)):
        return f"objective {name} follows a trained reward: give reward.path and no reward.head"
    return ""


def _rollout(config: Config, objective: RewardGradientConfig) -> Iterator[Fault]:
    """Yield the faults of keys that make the rollout cheaper where the method does not allow it."""
    rollout = config.rollout
    trains_all = objective.trains_every_step(rollout.steps)
    if rollout.stride > 1:
        if not rollout.solver_facts.takes_leaps:
            leaping = " or ".join(name for name, facts in SOLVERS.items() if facts.takes_leaps)
            yield "rollout.stride", f"{rollout.solver} takes no leaps; it is for solver: {leaping}"
        if trains_all and not objective.starts_from_data:
            yield "rollout.stride", f"objective {objective.name} trains every step; there is none to leap over"
        if not objective.needs_rollout:
            yield "rollout.stride", "objective.from_data: 1 needs no rollout"
    if rollout.cheaper != CheaperConfig():
        if trains_all or rollout.steps == 1:
            yield "rollout.cheaper", f"objective {objective.name} trains every step; those stay exact"
        if not objective.needs_rollout:
            yield "rollout.cheaper", "objective.from_data: 1 needs no rollout"
    if rollout.gradients_per_rollout > 1:
        yield from _shared_rollout(config, objective)


def _shared_rollout(config: Config, objective: RewardGradientConfig) -> Iterator[Fault]:
    """Yield the faults of a rollout that is shared by several optimizer steps."""
    key, adapter = "rollout.gradients_per_rollout", config.backbone.adapter
    if not objective.shares_rollout:
        sharing = [method for method in kinds(RewardGradientConfig, "name") if getattr(method, "shares_rollout", False)]
        *names, last = (tag[1] for method in sharing if (tag := tag_of(method)))
        what = f"objective {objective.name} needs its own rollout each time; it is for {', '.join(names)} and {last}"
        yield key, what
    if config.rollout.solver_facts.multistep:
        sharing_solvers = " or ".join(name for name, facts in SOLVERS.items() if not facts.multistep)
        what = f"{config.rollout.solver}'s steps contain outputs of the policy that made the rollout"
        yield key, f"{what}; take {sharing_solvers}"
    if adapter and adapter.dropout:
        yield key, "backbone.adapter.dropout would pass for drift; set it to 0"
