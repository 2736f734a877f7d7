"""What can be said and done of a family of video models without a loaded one."""

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
"""What the folder of a pipeline's first network may be called."""


@dataclass(frozen=True)
class FileOfNetwork:
    """Of one of several networks: the ending of its file's name, and what diffusers' ``load_lora_weights`` is told."""

    ending: str
    told: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """How a LoRA of the family is written, for diffusers and for the programs that read the original names.

    prefix: before every layer's name.  original_name: of a layer; raises PrflError where it has none.  alpha_below: of
    which layers, by the beginnings of their diffusers names, the readers take ``.alpha``; elsewhere it goes into B.
    Where they are not empty, diffusers takes a file for this family's by a layer that lies there.
    architecture, implementation: as modelspec names them.  load: the call by which ``pipeline`` loads the file.
    before: lines that it needs before that.  use: what to do with the file outside diffusers.  of_networks: of a model
    of several networks, the file of each; empty where one LoRA of all of them cannot be written for others.
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
    """pipeline: the class that model_index.json names.  network: the class of what predicts.
    task: what the hub calls it.  fits: which of the pipeline's models are of the family, by their model_index.json.

    load: the model of a source, on its device; where that is ``meta``, without weights and without a tokenizer.
    lora: its files.  shipped: hub ids whose architecture files are inside the package, and the folders that hold them.
    usual: frames, pixels a frame and frames a second of the models' own videos.
    condition_in_loop: of the prompt embeddings that the pipeline hands to a ``callback_on_step_end``, (b, tokens, d);
    None where its latents there are not the backbone's, so that no reward can score them.
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
