"""The reward of a config on ``meta``, for counting."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from prfl.backbone import Backbone
from prfl.config.objective_schema import InstructVideoConfig
from prfl.config.schema import Config, LatentRewardConfig, PixelRewardConfig, PreferenceConfig, listed
from prfl.factory.reward import Reward, build_new_reward, load_followed_reward, reward_path
from prfl.reward.aesthetic import AestheticMlp, AestheticReward
from prfl.reward.checkpoint import read_config
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.head import RewardHead
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelNetwork, PixelReward

VIT_L_14 = {  # what decides the size of openai/clip-vit-large-patch14's image side
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224,
    },
}  # fmt: skip


def reward_on_meta(config: Config, model: Backbone) -> tuple[Reward | None, str]:
    """Build the reward on ``meta``; returns, too, in words what had to be assumed of one that is not trained yet."""
    if config.reward is None:
        return None, ""
    with torch.device("meta"), warnings.catch_warnings():
        # Weights of a trained reward are not copied to meta, of which torch warns: only their sizes count.
        warnings.filterwarnings("ignore", "for .* copying from a non-meta parameter")
        if isinstance(config.objective, PreferenceConfig):
            return build_new_reward(config, model), ""
        if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
            return AestheticReward(CLIPModel(CLIPConfig(**VIT_L_14)), AestheticMlp()), ""
        paths = listed(config.reward.path)
        if paths and all(Path(reward_path(path)).is_dir() for path in paths):
            return load_followed_reward(config, model), ""
        if isinstance(config.reward, LatentRewardConfig):
            blocks = max(1, model.num_blocks // 5)
            heads = [LatentReward(RewardHead(model.width, ["reward"]), model, [blocks - 1]).freeze() for _ in paths]
            many = f"{len(heads)} frozen reward heads" if len(heads) > 1 else "a frozen reward head"
            what = f"{many} on the first {blocks} of {model.num_blocks} blocks (not trained yet)"
            return RewardEnsemble(heads) if len(heads) > 1 else heads[0], what
        network = PixelNetwork(model.text_width, ["reward"])
        return PixelReward(network).freeze(), "prfl's own small pixel reward (it is not trained yet)"


def reads_of_a_score(config: Config) -> int:
    """Count the forward passes of the reward for one score with its gradient.

    Of an ensemble whose members have adapters: two for each adapter and, together, two for those that have none
    (``RewardEnsemble``).  A reward that is not trained yet, or not in a folder, counts as one without.
    """
    objective = config.objective
    decays = isinstance(objective, InstructVideoConfig) and objective.temporal_decay is not None
    alone = decays and getattr(objective, "frames", None) not in ("one", 1)
    if isinstance(config.reward, PixelRewardConfig):  # ``PixelScorer``: frames that are scored by themselves, again
        return 2 if alone and not config.reward.aesthetic else 1
    paths = listed(config.reward.path) if config.reward else []
    passes: set[int | None] = set()  # the member's number where it has an adapter; None stands for all the others
    for number, folder in enumerate(Path(reward_path(path)) for path in paths):
        has_adapter = folder.is_dir() and read_config(folder).get("adapter")
        passes.add(number if has_adapter else None)
    return 2 * len(passes) if len(passes) > 1 else 1
