"""Loading from Python, without a config: a video model, and a reward on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from prfl import backbone as backbones
from prfl.backbone import Backbone
from prfl.backbone import backbone_from_pipeline as backbone_from_pipeline
from prfl.factory import reward as rewards
from prfl.factory.backbone import shapes_or
from prfl.reward.latent import LatentReward
from prfl.utils.errors import PrflError


def load_backbone(
    folder_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    pipeline: str | None = None,
    files: Mapping[str, Path] | None = None,
    base_lora: Path | Mapping[str, Path] | None = None,
) -> Backbone:
    """Load a video model of a family that prfl has (README: Models and cards) from a diffusers folder or a hub id.

    ``shapes`` is the one inside the package.

    revision: of the hub's.  pipeline: the diffusers pipeline that it is loaded as, where it serves several.
    files: checkpoints in one safetensors file, by the network whose weights they replace, as ``transformer``.
    base_lora: a LoRA file that is merged into the weights, and frozen with them; of two experts {"high": ...,
    "low": ...}.
    Raises PrflError when a part is missing, and for models of another kind.
    """
    if isinstance(folder_or_hub, DiffusionPipeline):
        fix = "prfl.backbone_from_pipeline(pipe)"
        raise PrflError("a pipeline that is loaded already is no folder or hub id", where="load_backbone", fix=fix)
    return backbones.load_backbone(shapes_or(folder_or_hub), dtype, device, revision, pipeline, files, base_lora)


def load_reward(
    folder_or_hub: str | Path, backbone: Backbone | DiffusionPipeline, adapter_name: str | None = None
) -> LatentReward:
    """Load a saved latent reward, frozen, on the model that it reads; ``shapes`` is the one inside the package.

    backbone: what ``load_backbone`` returned, or a diffusers pipeline, whose networks are then shared and not copied.
    adapter_name: another name for the reward's adapter, where two rewards share a model.
    Raises PrflError naming every way in which the model is not the one that the reward was trained on.
    """
    if isinstance(backbone, DiffusionPipeline):
        backbone = backbone_from_pipeline(backbone)
    reward = rewards.load_reward(folder_or_hub, backbone, adapter_name)
    if not isinstance(reward, LatentReward):
        fix = f"prfl.PixelReward.from_pretrained({str(folder_or_hub)!r})"
        raise PrflError("it is a pixel reward, which reads decoded videos", where=str(folder_or_hub), fix=fix)
    return reward
