"""Align video generators by the gradient of a latent reward, without decoding.

    backbone = prfl.load_backbone("folder-or-hub-id")
    reward = prfl.LatentReward.from_pretrained("folder-or-hub-id", backbone=backbone)
    scores = reward(latents, sigma, backbone.condition(["a red circle moves left quickly"]))

The names below are imported when they are first used, so that ``prfl --help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfl.backbone import load_backbone as load_backbone
    from prfl.reward.latent import LatentReward as LatentReward
    from prfl.reward.pixel import PixelReward as PixelReward
    from prfl.utils.errors import PrflError as PrflError

_HOMES = {
    "load_backbone": "prfl.backbone",
    "LatentReward": "prfl.reward.latent",
    "PixelReward": "prfl.reward.pixel",
    "PrflError": "prfl.utils.errors",
}
__all__ = ["LatentReward", "PixelReward", "PrflError", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prfl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
