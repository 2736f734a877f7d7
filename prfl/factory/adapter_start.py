"""A policy's adapter that starts from a LoRA file of others, in the names that trainers and programs write.

    transformer.blocks.0.attn1.to_q.lora_A.weight            diffusers
    diffusion_model.blocks.0.self_attn.q.lora_down.weight    ComfyUI, and trainers that write for it; or lora_A
    lora_unet_blocks_0_self_attn_q.lora_down.weight          kohya's and musubi's trainers
    blocks.0.attn1.to_q.lora_A.weight                        a run's policy.safetensors

The update of a layer is B A x * alpha / rank: alpha is the file's (``LAYER.alpha``, or what its metadata say), or else
its rank.  Where the config's alpha is another one, B takes the factor, so that the update is the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.families import FAMILIES
from prfl.backbone.family import LoraFile
from prfl.backbone.weights import check_finite
from prfl.config.schema import Config
from prfl.factory import provenance
from prfl.factory.backbone import POLICY
from prfl.utils.console import console
from prfl.utils.errors import PrflError, error_location
from prfl.utils.reading import disk_refuses, unreadable

KINDS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
PREFIXES = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
UNDERSCORED = ("lora_unet_", "lora_transformer_")
WHERE, SHOWN = "backbone.adapter.init", 3
SAVE_AGAIN = "give a LoRA as safetensors, whole: a matrix A and a matrix B of each layer"


@dataclass(frozen=True)
class LoraWeights:
    """A file's matrices and alphas, by its own names of layers: ``down``, ``up``, and ``alpha`` where it has one."""

    layers: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]


def start_adapter(config: Config, model: Backbone) -> None:
    """Give the policy's adapter the weights of ``backbone.adapter.init``, where the config names a file.

    Raises PrflError where the file and the adapter are not of the same layers, with the names of those that differ.
    """
    adapter = config.backbone.adapter
    if adapter is None or adapter.init is None:
        return
    with error_location(WHERE):
        weights = read_lora(adapter.init)
        fill_adapter(model, weights, adapter.alpha, FAMILIES[model.facts.family].lora)
    console.say(f"the adapter starts from {adapter.init}: {len(weights.layers)} layers")


def read_lora(path: Path) -> LoraWeights:
    """Read a file.  Raises PrflError for what is no LoRA, for keys of another kind and for half a layer."""
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error) from error
        raise PrflError(f"{path} is no safetensors file: {error}", fix=SAVE_AGAIN) from error

    layers: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in KINDS if name.endswith(ending)), None)
        if ending is None:
            strange.append(name)
        else:
            layers.setdefault(name.removesuffix(ending), {})[KINDS[ending]] = tensor
    if strange:
        what = f"{len(strange)} of the {len(tensors)} keys of {path} are no part of a plain LoRA: {listed(strange)}"
        raise PrflError(what, fix=SAVE_AGAIN)
    if half := [name for name, parts in layers.items() if not parts.keys() >= {"down", "up"}]:
        raise PrflError(f"{len(half)} layers of {path} lack a matrix: {listed(half)}", fix=SAVE_AGAIN)
    check_finite(tensors, WHERE, "save the LoRA again, or take an earlier one")
    return LoraWeights(layers, metadata)


@torch.no_grad()
def fill_adapter(model: Backbone, weights: LoraWeights, alpha: float, form: LoraFile) -> None:
    """Copy a file's matrices into the policy's adapter.  alpha: the adapter's own."""
    if len(model.facts.blocks) > 1:
        what = f"one LoRA file for the networks {' and '.join(model.facts.blocks)}"
        raise PrflError(f"{what} is not supported yet", fix="leave backbone.adapter.init out")
    parameters = model.parameters(POLICY)
    layers = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in parameters))
    file_name = matched(layers, weights, form)
    own_names = set(weights.layers) <= set(layers)  # of a run's policy.safetensors
    for layer, named in file_name.items():
        parts = weights.layers[named]
        a, b = (parameters[f"{layer}.lora_{letter}.weight"] for letter in "AB")
        down, up = parts["down"].to(a), parts["up"].to(b)
        check_shapes(layer, (down, up), (a, b))
        scale = alpha_of(named, parts, weights.metadata, own_names) / len(down)
        a.copy_(down)
        b.copy_(up * (scale * len(a) / alpha))


def matched(layers: list[str], weights: LoraWeights, form: LoraFile) -> dict[str, str]:
    """The file's name of each of the adapter's layers.  Raises PrflError unless the two have the same ones."""
    spelled = {name: layer for layer in layers for name in spellings(layer, form)}
    layer_of = {name: spelled[name] for name in weights.layers if name in spelled}
    if not layer_of:
        what = f"none of the file's {len(weights.layers)} layers is one of the adapter's {len(layers)}: it has "
        what += f"{listed(list(weights.layers))}; the adapter {listed(layers)}"
        raise PrflError(what, fix="give a LoRA of this model, in the names of diffusers, ComfyUI, kohya or musubi")
    if others := [name for name in weights.layers if name not in layer_of]:
        what = f"{len(others)} of the file's {len(weights.layers)} layers are none of the adapter's: {listed(others)}"
        raise PrflError(what, fix="add the ends of their names to backbone.adapter.targets, with blocks: all")
    if absent := [layer for layer in layers if layer not in layer_of.values()]:
        what = f"{len(absent)} of the adapter's {len(layers)} layers are not in the file: {listed(absent)}"
        raise PrflError(what, fix="leave them out of backbone.adapter.targets, or of backbone.adapter.blocks")
    if len(layer_of) > len(layers):
        twice = [name for name in layer_of if list(layer_of.values()).count(layer_of[name]) > 1]
        raise PrflError(f"the file has a layer twice, under two names: {listed(twice)}", fix=SAVE_AGAIN)
    return {layer: name for name, layer in layer_of.items()}


def spellings(layer: str, form: LoraFile) -> list[str]:
    """The names that files have for a layer."""
    names = [layer]
    try:
        names.append(form.original_name(layer))
    except PrflError:  # the original checkpoint has no such layer
        pass
    plain = [f"{prefix}{name}" for name in names for prefix in PREFIXES]
    return plain + [f"{prefix}{name.replace('.', '_')}" for name in names for prefix in UNDERSCORED]


def alpha_of(name: str, parts: Mapping[str, Tensor], metadata: Mapping[str, str], own_names: bool) -> float:
    """A layer's alpha: its own, or what the file's metadata say for all, or its rank, which scales by 1.

    own_names: whether its layers are named as a run's policy is: then the stamp of that run says it.
    """
    if "alpha" in parts:
        return float(parts["alpha"])
    if own_names and provenance.KEY in metadata:
        return float(json.loads(metadata[provenance.KEY]).get("alpha", len(parts["down"])))
    told: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))  # as diffusers saves it
    scale = {key.rpartition(".")[2]: value for key, value in told.items()}
    if odd := [key for key in ("alpha_pattern", "use_rslora", "use_dora") if scale.get(key)]:
        what = f"the file's scale is not one alpha / rank: its metadata have {odd[0]}"
        raise PrflError(what, fix="save it with one alpha, or with B scaled and without metadata")
    return float(scale.get("lora_alpha", len(parts["down"])))


def check_shapes(layer: str, of_file: tuple[Tensor, Tensor], ours: tuple[Tensor, Tensor]) -> None:
    """Raise PrflError where a layer's matrices are of another rank, or of another model."""
    files, adapters = [tuple(tensor.shape) for tensor in of_file], [tuple(tensor.shape) for tensor in ours]
    if files == adapters:
        return
    rank, of_adapter = len(of_file[0]), len(ours[0])
    if rank != of_adapter and files == [(rank, *adapters[0][1:]), (adapters[1][0], rank, *adapters[1][2:])]:
        fix = f"backbone.adapter.rank: {rank}; its alpha may be any, the update stays the file's"
        raise PrflError(f"the file's {layer} has rank {rank}, and the adapter {of_adapter}", fix=fix)
    raise PrflError(f"the file's {layer} is {files}, and the adapter's {adapters}", fix="give a LoRA of this model")


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
