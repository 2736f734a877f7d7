"""What is done with the networks of a backbone of any family: copies, waiting on the host, their lists of blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TypeVar

from torch import Tensor, nn

from prfl.backbone.adapters import adapter_parameters, block_names, block_of, has_adapter
from prfl.backbone.base import Backbone

T = TypeVar("T")


def predictors(backbone: Backbone) -> dict[str, nn.Module]:
    """The networks of the base that predict, by name."""
    return {name: backbone.networks[name] for name in backbone.facts.blocks}


def joined(parts: Mapping[str, Mapping[str, T]], first: str | None) -> dict[str, T]:
    """What is there by network and name, by name alone: those of all networks but the first begin with its name.

    first: the model's first network, which may have no part.
    """
    prefixes = {key: "" if key == first else f"{key}." for key in parts}
    return {f"{prefixes[key]}{name}": value for key, values in parts.items() for name, value in values.items()}


def split(values: Mapping[str, T], networks: Sequence[str]) -> dict[str, dict[str, T]]:
    """What ``joined`` put together, by network and name; networks that have nothing are left out."""
    first, *others = networks
    parts: dict[str, dict[str, T]] = {key: {} for key in networks}
    for name, value in values.items():
        key, _, rest = name.partition(".")
        parts[key if key in others else first][rest if key in others else name] = value
    return {key: part for key, part in parts.items() if part}


def fingerprints(backbone: Backbone) -> dict[str, str]:
    """Of the base's weights, by network: the predicting ones, then the VAE."""
    return {name: backbone.facts.identity[f"{name}_fingerprint"] for name in (*backbone.facts.blocks, "vae")}


def copies(backbone: Backbone) -> dict[str, nn.Module]:
    """The trained copies of them, as ``policy/transformer``."""
    return {name: network for name, network in backbone.networks.items() if "/" in name}


def base_networks(backbone: Backbone) -> dict[str, nn.Module]:
    """All networks that are no copies."""
    return {name: network for name, network in backbone.networks.items() if "/" not in name}


def all_predictors(backbone: Backbone) -> list[nn.Module]:
    return [*predictors(backbone).values(), *copies(backbone).values()]


def computing(backbone: Backbone, adapter: str | None) -> dict[str, nn.Module]:
    """The networks that predict under an adapter, by the base's names: its copies where it has some."""
    return {name: backbone.networks.get(f"{adapter}/{name}", base) for name, base in predictors(backbone).items()}


def train_all(backbone: Backbone, networks: Sequence[str] | None = None) -> None:
    """Every weight is trained in place, in float32: there is no base any more.  networks: of these alone."""
    for key in networks or backbone.facts.blocks:
        backbone.networks[key].float().requires_grad_(True)


def add_copy(backbone: Backbone, name: str, networks: Sequence[str] | None = None) -> None:
    """A trainable float32 copy of all weights, selected as an adapter is; the base stays frozen beside it.

    networks: of these alone; None is all.
    """
    for key in networks or backbone.facts.blocks:
        network = backbone.networks[key]
        backbone.networks[f"{name}/{key}"] = deepcopy(network).float().requires_grad_(True)


@contextmanager
def on_host(backbone: Backbone) -> Iterator[None]:
    """The predicting networks wait on the host: room for a text encoder, which at 1.3B is four times as large, or for
    the decoder of a long video."""
    turns = backbone.running.turns
    if turns is not None:
        turns.free()
    for network in all_predictors(backbone):
        network.to("cpu")
    try:
        yield
    finally:
        for network in all_predictors(backbone):
            if turns is None:
                network.to(backbone.facts.device)
            else:
                turns.return_others(network)


def park_vae(backbone: Backbone) -> None:
    """The VAE waits on the host; the next ``encode`` or ``decode`` brings it back."""
    backbone.networks["vae"].to("cpu")


def base_weights(network: nn.Module) -> list[Tensor]:
    """Parameters and buffers without those of adapters."""
    return [
        *(parameter for name, parameter in network.named_parameters() if ".lora_" not in name),
        *network.buffers(),
    ]


def with_lists(backbone: Backbone) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every predicting network, copies too, with the names of its lists of blocks."""
    lists = backbone.facts.blocks
    base = [(network, lists[name]) for name, network in predictors(backbone).items()]
    return base + [(network, lists[name.partition("/")[2]]) for name, network in copies(backbone).items()]


def blocks_of_each(backbone: Backbone) -> dict[str, list[nn.Module]]:
    """The blocks of each of the base's networks, in the order in which they run."""
    lists = backbone.facts.blocks
    return {
        name: [network.get_submodule(block) for block in block_names(network, lists[name])]
        for name, network in predictors(backbone).items()
    }


def base_blocks(backbone: Backbone) -> list[nn.Module]:
    """The blocks of the base's networks, one network after the other."""
    return [block for blocks in blocks_of_each(backbone).values() for block in blocks]


def reach(backbone: Backbone, adapter: str) -> tuple[int, int]:
    """On how many layers an adapter is, and in how many blocks these lie."""
    layers, blocks = 0, 0
    for name, network in predictors(backbone).items():
        if not has_adapter(network, adapter):
            continue
        keys = {key.rpartition(".lora_")[0] for key in adapter_parameters(network, adapter)}
        names = block_names(network, backbone.facts.blocks[name])
        layers += len(keys)
        blocks += len({block_of(key, names) for key in keys} - {None})
    return layers, blocks
