"""The families of video models, a line of the table each, and how one is found for a model and loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from prfl.backbone.base import Backbone
from prfl.backbone.cogvideox.family import COGVIDEOX
from prfl.backbone.experts import Experts, key_of_lora, loras_by_network
from prfl.backbone.family import Family, LoraFile
from prfl.backbone.loaded import LoadedPipeline
from prfl.backbone.lora_file import merge_lora
from prfl.backbone.modelscope.family import MODELSCOPE
from prfl.backbone.source import Source
from prfl.backbone.svd.family import SVD
from prfl.backbone.wan.experts import WAN_EXPERTS
from prfl.backbone.wan.family import WAN
from prfl.backbone.wan.image_experts import WAN_IMAGE_EXPERTS
from prfl.backbone.wan.image_to_video import WAN_IMAGE
from prfl.backbone.wan.pinned_frame import WAN_PINNED_FRAME
from prfl.utils.errors import PrflError, error_location

FAMILIES: dict[str, Family] = {
    "wan": WAN,
    "wan_experts": WAN_EXPERTS,
    "wan_image": WAN_IMAGE,
    "wan_image_experts": WAN_IMAGE_EXPERTS,
    "wan_pinned_frame": WAN_PINNED_FRAME,
    "cogvideox": COGVIDEOX,
    "modelscope": MODELSCOPE,
    "svd": SVD,
}
"""By the name that ``Facts.family`` has."""
BASE_LORA = "backbone.base_lora"


def find_family(source: Source) -> Family:
    """The family of a pipeline, by the class that its model_index.json names.  Raises PrflError for any other class."""
    index = source.index
    name = index.get("_class_name")
    for family in FAMILIES.values():
        if family.pipeline == name and family.fits(index):
            return family
    known_pipelines = ", ".join(dict.fromkeys(family.pipeline for family in FAMILIES.values()))
    raise PrflError(f"a {name} is not supported", where=source.name, fix=f"give a model of one of {known_pipelines}")


def load_backbone(
    folder_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    pipeline: str | None = None,
    files: Mapping[str, Path] | None = None,
    base_lora: Path | Mapping[str, Path] | None = None,
    one_resident: bool = False,
) -> Backbone:
    """A video model of a known family in diffusers' pipeline format, from a folder or a hub id.

    pipeline: the class to load it as, where it serves several; None is the one that its model_index.json names.
    files: checkpoints in one file each, in place of the weights of these folders of the pipeline.
    base_lora: a LoRA that is merged into the network's weights, and from then on part of the base; of a model of two
    experts a file of each, or of one of them: {"high": ..., "low": ...}.
    one_resident: of two networks that take turns along the chain, whether the other's frozen weights wait on the host.

    Only safetensors are read and no remote code is run.  The text encoder is loaded at its first use; the VAE is kept
    in float32 when ``dtype`` is a half precision, as the models' authors advise.
    Raises PrflError when the folder or a part is missing, and for models of another kind, with those that are known.
    """
    source = Source(str(folder_or_hub), revision, torch.device(device), pipeline, files or {})
    family = find_family(source)
    if base_lora is not None:
        with error_location(BASE_LORA):
            loras = loras_by_network(base_lora, family.lora)
        source = replace(source, finish=partial(merge_into, loras, family.lora))
    if one_resident:
        source = replace(source, waiting=list(family.lora.of_networks))
    model = family.load(source, dtype)
    check_files(model, files or {})
    if one_resident and isinstance(model, Experts):
        model.take_turns()
    return model


def merge_into(loras: Mapping[str, Path], form: LoraFile, folder: str, network: nn.Module) -> None:
    """Merge a LoRA into the network of its name; other networks stay as they are."""
    if folder in loras:
        with error_location(key_of_lora(BASE_LORA, form, folder)):
            merge_lora(loras[folder], form, network)


def check_files(model: Backbone, files: Collection[str]) -> None:
    """Raise PrflError for a file of a network that the model does not have."""
    if strange := [name for name in files if name not in model.networks]:
        what = f"the model has no {strange[0]}: its networks are {', '.join(model.networks)}"
        raise PrflError(what, where=f"backbone.weights.{strange[0]}", fix="leave it out")


def backbone_from_pipeline(pipe: DiffusionPipeline) -> Backbone:
    """The model of a diffusers pipeline that is loaded already: the same networks, on its device, in its dtype.

    Nothing is copied.  The networks are frozen and put into evaluation mode; the pipeline goes on working.
    Raises PrflError for pipelines of another kind, that lack a network, or whose networks move between devices.
    """
    source = LoadedPipeline.of(pipe)
    return find_family(source).load(source, pipe.dtype)


def load_architecture(
    folder_or_hub: str | Path,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    pipeline: str | None = None,
) -> Backbone:
    """The model that ``load_backbone`` would load, on torch's ``meta`` device: shapes and dtypes, no memory.

    It has no tokenizer, so ``condition`` does not work.  The architectures of some hub models are part of the package.
    Raises PrflError like ``load_backbone``.
    """
    folder = architecture_folder(str(folder_or_hub))
    source = Source(folder, None if folder != str(folder_or_hub) else revision, torch.device("meta"), pipeline)
    return find_family(source).load(source, dtype)


def architecture_folder(folder_or_hub: str) -> str:
    """Where the architecture files are: the folder itself, inside the package, or else on the hub."""
    shipped = {hub: folder for family in FAMILIES.values() for hub, folder in family.shipped.items()}
    if Path(folder_or_hub).is_dir() or folder_or_hub not in shipped:
        return folder_or_hub
    return str(shipped[folder_or_hub])
