"""The reward of a config on ``meta``, for counting."""

from __future__ import annotations

import warnings
from pathlib import Path

from prfl.backbone import Backbone
from prfl.backbone.weights import without_weights
from prfl.config.schema import Config
from prfl.factory.reward import (
    Reward,
    build_new_reward,
    load_latent_beside,
    load_trained_rewards,
    reward_path,
    untrained_public_rewards,
)
from prfl.reward.checkpoint import read_config
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.several import LatentBeside


def reward_on_meta(config: Config, model: Backbone) -> tuple[Reward | None, str]:
    """Build the reward on ``meta``; returns, too, in words what had to be assumed of one that is not trained yet."""
    if config.reward is None:
        return None, ""
    with without_weights(), warnings.catch_warnings():
        # Weights of a trained reward are not copied to meta, of which torch warns: only their sizes count.
        warnings.filterwarnings("ignore", "for .* copying from a non-meta parameter")
        if config.trains_reward:
            return build_new_reward(config, model), ""
        reward, assumed = _followed(config, model)
        latent = getattr(config.reward, "latent", None)
        if latent is None:
            return reward, assumed
        if Path(reward_path(latent)).is_dir():
            beside, also = load_latent_beside(latent, config, model), ""
        else:
            beside, also = _assumed_head(model), f"a frozen reward head beside it, {_blocks_read(model)}"
        assert isinstance(reward, PixelReward | PublicReward)
        return LatentBeside(beside, reward), "; ".join(text for text in (assumed, also) if text)


def _followed(config: Config, model: Backbone) -> tuple[Reward, str]:
    assert config.reward is not None
    if config.reward.public:
        return untrained_public_rewards(config), ""
    paths = config.reward.paths
    if paths and all(Path(reward_path(path)).is_dir() for path in paths):
        return load_trained_rewards(config, model), ""
    if not config.reward.decodes:
        heads = [_assumed_head(model) for _ in paths]
        many = f"{len(heads)} frozen reward heads" if len(heads) > 1 else "a frozen reward head"
        return RewardEnsemble(heads) if len(heads) > 1 else heads[0], f"{many} {_blocks_read(model)}"
    network = PixelNetwork(model.facts.text_width, ["reward"])
    return PixelReward(network).freeze(), "prfl's own small pixel reward (it is not trained yet)"


def _assumed_head(model: Backbone) -> LatentReward:
    """A head behind the usual block, which is what one that is not trained yet is taken for."""
    block = model.facts.usual_block
    return LatentReward(RewardHead(model.facts.width_after([block]), ["reward"]), model, [block]).freeze()


def _blocks_read(model: Backbone) -> str:
    return f"on the first {model.facts.usual_block + 1} of {model.facts.num_blocks} blocks (not trained yet)"


def reads_of_a_score(config: Config) -> int:
    """Count the forward passes of the reward for one score with its gradient.

    Of an ensemble whose members have adapters: two for each adapter and, together, two for those that have none
    (``RewardEnsemble``).  A reward that is not trained yet, or not in a folder, counts as one without.
    """
    objective, reward = config.reward_gradient, config.reward
    if reward is None or reward.decodes:  # ``PixelScorer``: frames that are scored by themselves, again
        alone = objective is not None and objective.scores_frames_alone
        return 2 if alone and not (reward and reward.public) else 1
    passes: set[int | None] = set()  # the member's number where it has an adapter; None stands for all the others
    for number, folder in enumerate(Path(reward_path(path)) for path in reward.paths):
        has_adapter = folder.is_dir() and read_config(folder).get("adapter")
        passes.add(number if has_adapter else None)
    return 2 * len(passes) if len(passes) > 1 else 1
