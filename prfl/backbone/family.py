"""The description of a family of video models: how its models are found, loaded and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl.backbone.base import Backbone
from prfl.backbone.condition import Condition
from prfl.backbone.source import Source

FIRST_NETWORKS = ("transformer", "unet")
"""Possible names of the folder of a pipeline's first network."""


@dataclass(frozen=True)
class FileOfNetwork:
    """The LoRA file of one of several networks: its name's ending, and arguments for ``load_lora_weights``."""

    ending: str
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """How a LoRA of the family is written, for diffusers and for the programs that read the original names.

    prefix: stands before every layer's name.
    original_name: the original name of a layer; raises PrflError for a layer without one.
    alpha_below: beginnings of the diffusers names of layers whose ``.alpha`` the readers use; for other layers alpha is
    multiplied into B.  If there are any, diffusers recognises a file of this family by a layer with such a name.
    architecture, implementation: as modelspec names them.
    load: the call by which ``pipeline`` loads the file.  before: lines of code that must run before it.
    use: how to use the file outside diffusers.
    of_networks: for a model of several networks, the file of each; empty if it has one network, or if a LoRA of several
    cannot be written for other programs, so that an export is refused.
    """

    prefix: str
    original_name: Callable[[str], str]
    alpha_below: tuple[str, ...]
    architecture: str
    implementation: str
    load: str = "pipeline.load_lora_weights({arguments})"
    before: str = ""
    use: str = ""
    of_networks: Mapping[str, FileOfNetwork] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """pipeline: the class that model_index.json names.  network: the class of the network that predicts.
    task: the hub's name of the task.  fits: whether a pipeline's model_index.json is one of this family.

    load: loads the model of a source on its device; on ``meta`` without weights and without a tokenizer.
    lora: how its LoRA files are written.
    shipped: hub ids whose architecture files are inside the package, with the folders that hold them.
    usual: frames, pixels of a frame, and frames per second of the models' usual videos.
    condition_in_loop: makes a condition of the prompt embeddings (b, tokens, d) that the pipeline passes to a
    ``callback_on_step_end``; None if the latents there are not the backbone's, so that no reward can score them.
    """

    pipeline: str
    network: str
    task: str = "text-to-video"
    fits: Callable[[Mapping[str, Any]], bool] = lambda index: True
    load: Callable[[Source, torch.dtype], Backbone]
    lora: LoraFile
    shipped: Mapping[str, Path] = field(default_factory=dict)
    usual: tuple[int, int, float] = (81, 480 * 832, 16)
    condition_in_loop: Callable[[Tensor], Condition] | None = None
