"""The reward of a config on ``meta``, for counting."""

from __future__ import annotations

from pathlib import Path

import torch

from prfl import build
from prfl.backbone import WanBackbone
from prfl.config.schema import Config, LatentRewardConfig, PreferenceConfig
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelNetwork, PixelReward


def reward_on_meta(config: Config, model: WanBackbone) -> tuple[build.Reward | None, str]:
    """The reward, and in words what had to be assumed of one that is not trained yet."""
    if config.reward is None:
        return None, ""
    with torch.device("meta"):
        if isinstance(config.objective, PreferenceConfig):
            return build.new_reward(config, model), ""
        if config.reward.path and Path(build.reward_place(config.reward.path)).is_dir():
            return build.trained_reward(config, model), ""
        if isinstance(config.reward, LatentRewardConfig):
            blocks = max(1, model.num_blocks // 5)
            head = LatentReward(RewardHead(model.width, ["reward"]), model, [blocks - 1]).freeze()
            return (
                head,
                f"a frozen reward head on the first {blocks} of {model.num_blocks} blocks (it is not trained yet)",
            )
        network = PixelNetwork(model.text_width, ["reward"])
        return PixelReward(network).freeze(), "prfl's own small pixel reward (it is not trained yet)"
