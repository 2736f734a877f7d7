"""Align video generators by the gradient of a latent reward, without decoding.

    backbone = prfl.load_backbone("shapes")  # or a folder, or a hub id
    reward = prfl.load_reward("shapes", backbone)
    scores = reward.score(latents, sigma=0.7, prompts="a red circle moves left quickly")

The names below are imported when they are first used, so that ``prfl --help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfl.factory.api import backbone_from_pipeline as backbone_from_pipeline
    from prfl.factory.api import load_backbone as load_backbone
    from prfl.factory.api import load_reward as load_reward
    from prfl.reward.latent import LatentReward as LatentReward
    from prfl.reward.pixel import PixelReward as PixelReward
    from prfl.utils.errors import PrflError as PrflError

_HOMES = {
    "backbone_from_pipeline": "prfl.factory.api",
    "load_backbone": "prfl.factory.api",
    "load_reward": "prfl.factory.api",
    "LatentReward": "prfl.reward.latent",
    "PixelReward": "prfl.reward.pixel",
    "PrflError": "prfl.utils.errors",
}
__all__ = ["LatentReward", "PixelReward", "PrflError", "backbone_from_pipeline", "load_backbone", "load_reward"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prfl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
