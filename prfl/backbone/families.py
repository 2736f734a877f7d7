"""The families of video models, a line of the table each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl.backbone.base import Backbone
from prfl.backbone.wan import architecture, loading, lora_names


@dataclass(frozen=True)
class Family:
    """What can be said and done without a loaded model.

    pipeline, network: diffusers' classes.  load, load_architecture: see ``wan.loading`` and ``wan.architecture``.
    small_block: (device, dtype, head size) to a network of one block with random weights, called on nothing.
    original_name: of a layer, in the original checkpoint.  blocks: what the names of layers inside the blocks begin
    with.  architecture, implementation: as modelspec names them.
    """

    pipeline: str
    network: str
    load: Callable[..., Backbone]
    load_architecture: Callable[..., Backbone]
    small_block: Callable[[str, torch.dtype, int], Callable[[], Tensor]]
    original_name: Callable[[str], str]
    blocks: tuple[str, ...]
    architecture: str
    implementation: str


FAMILIES = {
    "wan": Family(
        pipeline="WanPipeline",
        network="WanTransformer3DModel",
        load=loading.load_backbone,
        load_architecture=architecture.load_architecture,
        small_block=architecture.small_block,
        original_name=lora_names.original_name,
        blocks=("blocks.",),
        architecture=lora_names.ARCHITECTURE,
        implementation=lora_names.IMPLEMENTATION,
    )
}


def the_family() -> Family:
    """The family of every model, while there is one: others are refused when they are loaded."""
    (family,) = FAMILIES.values()
    return family
