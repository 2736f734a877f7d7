"""A policy's adapter that starts from a LoRA file of others (``prfl.backbone.lora_file``), and is trained on.

Where the config's alpha is another one than the file's, B takes the factor, so that the update is the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.experts import key_of_lora, loras_by_network
from prfl.backbone.families import FAMILIES
from prfl.backbone.family import LoraFile
from prfl.backbone.lora_file import OF_THIS_MODEL, LoraWeights, alpha_of, check_once, layers_named, listed, read_lora
from prfl.backbone.network import split
from prfl.config.schema import Config
from prfl.factory.backbone import POLICY
from prfl.factory.experts import INIT, lora_of_config
from prfl.utils.console import console
from prfl.utils.errors import PrflError, error_location


def start_adapter(config: Config, model: Backbone) -> None:
    """Give the policy's adapter the weights of ``backbone.adapter.init``, where the config names a file.

    Of two experts each starts from its own, and as the base where none is named.
    Raises PrflError where a file and the adapter are not of the same layers, with the names of those that differ.
    """
    adapter, form = config.backbone.adapter, FAMILIES[model.facts.family].lora
    lora = lora_of_config(adapter.init if adapter else None)
    if adapter is None or lora is None:
        return
    with error_location(INIT):
        files = loras_by_network(lora, form)
    for network, parameters in split(model.parameters(POLICY), list(model.facts.blocks)).items():
        if network in files:
            with error_location(key_of_lora(INIT, form, network)):
                weights = read_lora(files[network])
                fill_adapter(parameters, weights, adapter.alpha, form)
            of = f" of the {network}" if form.of_networks else ""
            console.say(f"the adapter{of} starts from {files[network]}: {len(weights.layers)} layers")


@torch.no_grad()
def fill_adapter(parameters: Mapping[str, Tensor], weights: LoraWeights, alpha: float, form: LoraFile) -> None:
    """Copy a file's matrices into the parameters of a network's adapter.  alpha: the adapter's own."""
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
    layer_of = layers_named(weights, layers, form)
    if not layer_of:
        what = f"none of the file's {len(weights.layers)} layers is one of the adapter's {len(layers)}: it has "
        what += f"{listed(list(weights.layers))}; the adapter {listed(layers)}"
        raise PrflError(what, fix=OF_THIS_MODEL)
    if others := [name for name in weights.layers if name not in layer_of]:
        what = f"{len(others)} of the file's {len(weights.layers)} layers are none of the adapter's: {listed(others)}"
        fix = "add the ends of their names to backbone.adapter.targets, with blocks: all"
        if all(name.startswith(tuple(f"{network}." for network in list(form.of_networks)[1:])) for name in others):
            fix = "they are of the other expert: `prfl export` writes a run's policy as a file of each"
        raise PrflError(what, fix=fix)
    if absent := [layer for layer in layers if layer not in layer_of.values()]:
        what = f"{len(absent)} of the adapter's {len(layers)} layers are not in the file: {listed(absent)}"
        raise PrflError(what, fix="leave them out of backbone.adapter.targets, or of backbone.adapter.blocks")
    check_once(layer_of)
    return {layer: name for name, layer in layer_of.items()}


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
