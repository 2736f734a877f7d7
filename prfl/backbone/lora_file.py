"""LoRA files of others, in the names that trainers and programs write; and one that is merged into the base.

    transformer.blocks.0.attn1.to_q.lora_A.weight            diffusers
    diffusion_model.blocks.0.self_attn.q.lora_down.weight    ComfyUI, and trainers that write for it; or lora_A
    lora_unet_blocks_0_self_attn_q.lora_down.weight          kohya's and musubi's trainers
    blocks.0.attn1.to_q.lora_A.weight                        a run's policy.safetensors

The update of a layer is B A x * alpha / rank: alpha is the file's (``LAYER.alpha``, or what its metadata say), or else
its rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prfl.backbone.family import LoraFile
from prfl.backbone.weights import check_finite
from prfl.utils.errors import PrflError
from prfl.utils.reading import disk_refuses, unreadable

RUN_STAMP = "prfl"
"""The key of a run's policy.safetensors, in its metadata, that says what made it."""
KINDS = {
    ".lora_A.weight": "down", ".lora_down.weight": "down", ".lora.down.weight": "down",
    ".lora_B.weight": "up", ".lora_up.weight": "up", ".lora.up.weight": "up", ".alpha": "alpha",
}  # fmt: skip
PREFIXES = ("", "transformer.", "unet.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
UNDERSCORED = ("lora_unet_", "lora_transformer_")
SHOWN = 3
SAVE_AGAIN = "give a LoRA as safetensors, whole: a matrix A and a matrix B of each layer"
OF_THIS_MODEL = "give a LoRA of this model, in the names of diffusers, ComfyUI, kohya or musubi"


@dataclass(frozen=True)
class LoraWeights:
    """A file's matrices and alphas, by its own names of layers: ``down``, ``up``, and ``alpha`` where it has one."""

    layers: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]


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
    check_finite(tensors, "", "save the LoRA again, or take an earlier one")
    return LoraWeights(layers, metadata)


@torch.no_grad()
def merge_lora(path: Path, form: LoraFile, network: nn.Module) -> int:
    """Add a file's update to the weights of a network, in float32, and return of how many layers.

    Raises PrflError where a layer of the file is none of the network's, with its name, or is of another size.
    """
    weights = read_lora(path)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    layer_of = layers_named(weights, linear, form)
    if others := [name for name in weights.layers if name not in layer_of]:
        what = f"{len(others)} of the file's {len(weights.layers)} layers are none of the model's linear layers: "
        raise PrflError(what + listed(others), fix=OF_THIS_MODEL)
    check_once(layer_of)
    for name, layer in layer_of.items():
        parts, weight = weights.layers[name], linear[layer].weight
        down, up = (parts[part].to(weight.device, torch.float32) for part in ("down", "up"))
        if (len(up), *down.shape[1:]) != tuple(weight.shape) or up.shape[1:] != down.shape[:1]:
            what = f"the file's {layer} is {tuple(up.shape)} times {tuple(down.shape)}"
            raise PrflError(f"{what}, and the model's {tuple(weight.shape)}", fix=OF_THIS_MODEL)
        scale = alpha_of(name, parts, weights.metadata, set(weights.layers) <= set(linear)) / len(down)
        weight.copy_(weight.float() + scale * up @ down)
    return len(layer_of)


def layers_named(weights: LoraWeights, layers: Iterable[str], form: LoraFile) -> dict[str, str]:
    """Which of ``layers`` each of the file's is; those that are none are left out."""
    spelled = {name: layer for layer in layers for name in spellings(layer, form)}
    return {name: spelled[name] for name in weights.layers if name in spelled}


def check_once(layer_of: Mapping[str, str]) -> None:
    """Raise PrflError where a file has a layer twice."""
    layers = list(layer_of.values())
    if twice := [name for name, layer in layer_of.items() if layers.count(layer) > 1]:
        raise PrflError(f"the file has a layer twice, under two names: {listed(twice)}", fix=SAVE_AGAIN)


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
    if own_names and RUN_STAMP in metadata:
        return float(json.loads(metadata[RUN_STAMP]).get("alpha", len(parts["down"])))
    told: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))  # as diffusers saves it
    scale = {key.rpartition(".")[2]: value for key, value in told.items()}
    if odd := [key for key in ("alpha_pattern", "use_rslora", "use_dora") if scale.get(key)]:
        what = f"the file's scale is not one alpha / rank: its metadata have {odd[0]}"
        raise PrflError(what, fix="save it with one alpha, or with B scaled and without metadata")
    return float(scale.get("lora_alpha", len(parts["down"])))


def listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
