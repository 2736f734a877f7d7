"""Several LoRA adapters on one frozen network, and the one context manager that chooses between them.

peft's ``set_adapter("reward")`` takes gradients off every other adapter, and a block that checkpointing computes again
while another adapter is active gives a silently wrong gradient.  Here switching never changes ``requires_grad``, and a
recomputation under another adapter than its forward had raises.

peft also computes in the adapter's own precision: with float32 weights it casts, and autograd keeps, every layer's
input and output anew, half as much again as a bfloat16 block keeps without.  Here the weights are cast instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prfl.backbone.base import LoraSpec
from prfl.backbone.dropout import SampleDropout, dropouts
from prfl.backbone.weights import check_finite, copy_into
from prfl.utils.errors import PrflError

_WALKED: WeakKeyDictionary[nn.Module, tuple[list[LoraConfig], dict[str, LoraLayer]]] = WeakKeyDictionary()


def named_lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a whole network, remembered until an adapter comes or goes: the walk takes milliseconds.

    Whoever adds or deletes an adapter, a pipeline that loads a LoRA too, changes the network's ``peft_config``.
    """
    configs = list(getattr(network, "peft_config", {}).values())
    if network not in _WALKED or [id(config) for config in _WALKED[network][0]] != [id(config) for config in configs]:
        layers = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
        _WALKED[network] = configs, layers
    return _WALKED[network][1]


def lora_layers(network: nn.Module) -> list[LoraLayer]:
    return list(named_lora_layers(network).values())


def adapter_names(network: nn.Module) -> list[str]:
    return sorted({name for layer in lora_layers(network) for name in layer.lora_A})


def has_adapter(network: nn.Module, name: str) -> bool:
    return any(name in layer.lora_A for layer in lora_layers(network))


def active_adapter(network: nn.Module) -> str | None:
    """The adapter that the network's layers would use now (read from the layers themselves); None: the base."""
    layer = next((module for module in network.modules() if isinstance(module, LoraLayer)), None)
    return None if layer is None or layer.disable_adapters or not layer.active_adapters else layer.active_adapters[0]


LayerState = tuple[LoraLayer, tuple[str, ...], bool]
"""A layer, the adapters that act in it together, and whether they are switched on."""


def layer_states(layers: Sequence[LoraLayer]) -> list[LayerState]:
    """What acts now, layer by layer: a pipeline may have several LoRAs, each on layers of its own."""
    return [(layer, tuple(layer.active_adapters), not layer.disable_adapters) for layer in layers]


def put_back(layers: Sequence[LoraLayer], states: Sequence[LayerState]) -> None:
    """Let every layer act as it did; layers that have become LoRA layers since then act as the first one.

    Where there was none they are switched on and nothing acts in them, so that what a pipeline loads later does.
    """
    before = {id(layer): (active, enabled) for layer, active, enabled in states}
    newer = states[0][1:] if states else ((), True)
    for layer in layers:
        active, enabled = before.get(id(layer), newer)
        let_act(layer, active, enabled)


def let_act(layer: LoraLayer, active: tuple[str, ...], enabled: bool) -> None:
    """Change what acts in a layer where it is not so already; peft changes ``requires_grad`` by the way."""
    if tuple(layer.active_adapters) != active:
        layer.set_adapter(list(active))
    if layer.disable_adapters is enabled:
        layer.enable_adapters(enabled)


def set_active(network: nn.Module, name: str | None) -> None:
    """Switch, leaving every ``requires_grad`` as it was (peft changes them)."""
    layers = lora_layers(network)
    flags = factor_flags(layers)
    switch(layers, name)
    restore(flags)


def switch(layers: Sequence[LoraLayer], name: str | None) -> None:
    """Let one adapter act in these layers, or none; peft changes ``requires_grad`` by the way."""
    for layer in layers:
        let_act(layer, tuple(layer.active_adapters) if name is None else (name,), name is not None)


def requires_grad_flags(network: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in network.parameters()]


def factor_flags(layers: Sequence[LoraLayer]) -> list[tuple[nn.Parameter, bool]]:
    """The flags that peft changes when it switches: those of the adapters' own parameters."""
    parts = [part for layer in layers for name in layer.adapter_layer_names for part in getattr(layer, name).values()]
    return [(parameter, parameter.requires_grad) for part in parts for parameter in parameters_of(part)]


def parameters_of(part: nn.Module | nn.Parameter) -> Iterator[nn.Parameter]:
    return iter((part,)) if isinstance(part, nn.Parameter) else part.parameters()


def restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


@contextmanager
def use_adapter(network: nn.Module, name: str | None) -> Iterator[None]:
    """Select an adapter (None: the frozen base) for forward *and* backward; nests, also with the same name.

    On leaving, what acted in each layer and every ``requires_grad`` are as they were on entering.
    Raises PrflError when there is no such adapter.
    """
    layers = lora_layers(network)
    if name is not None and not has_adapter(network, name):
        raise PrflError(f"there is no adapter '{name}'", fix=f"the network has {adapter_names(network) or 'none'}")
    before = layer_states(layers)
    flags = factor_flags(layers)
    if any(enabled and active if name is None else not enabled or active != (name,) for _, active, enabled in before):
        switch(layers, name)
        restore(flags)
    try:
        yield
    finally:
        now = lora_layers(network)
        if layer_states(now) != before:
            put_back(now, before)
        restore(flags)


def same_adapter_only(modules: nn.Module, block: Callable[..., Any]) -> Callable[..., Any]:
    """``block``, refusing to run under another adapter, or another dropout, than now: to be given to checkpointing.

    modules: those that ``block`` runs; their layers alone say which adapter it computes under.
    """
    expected, layers = active_adapter(modules), dropouts(modules)
    masks = [layer.seeds for layer in layers]

    def checked(*inputs: Any) -> Any:
        now = active_adapter(modules)
        if now != expected:
            raise PrflError(
                f"a checkpointed block ran forward under adapter {expected!r} and is computed again under {now!r}",
                fix="call backward inside the same `with backbone.adapter(...)` as the forward",
            )
        if any(layer.seeds is not seeds for layer, seeds in zip(layers, masks, strict=True)):
            raise PrflError(
                "a checkpointed block is computed again with other dropout masks than it ran forward with",
                fix="call backward inside the same `with backbone.dropping(...)` as the forward, with the same tensor",
            )
        return block(*inputs)

    return checked


def block_names(network: nn.Module, lists: Sequence[str]) -> list[str]:
    """``blocks.0``, ``blocks.1``, ...: the blocks of a network's lists, in the order in which they run.

    What is no list is one block, as the middle of a UNet is.
    """
    names: list[str] = []
    for name in lists:
        part = network.get_submodule(name)
        names += [f"{name}.{index}" for index in range(len(part))] if isinstance(part, nn.ModuleList) else [name]
    return names


def block_of(layer: str, blocks: Sequence[str]) -> str | None:
    """The block that a layer lies in."""
    return next((block for block in blocks if layer.startswith(f"{block}.")), None)


def matching_layers(network: nn.Module, spec: LoraSpec, lists: Sequence[str]) -> list[str]:
    """Full names of the linear layers that end in one of the targets, optionally only in some blocks.

    lists: the names of the network's lists of blocks.
    Raises PrflError for a target that matches nothing, and for blocks that do not exist.
    """
    blocks = block_names(network, lists)
    if spec.blocks is not None and not set(spec.blocks) <= set(range(len(blocks))):
        raise PrflError(
            f"adapter blocks {list(spec.blocks)} do not all exist", fix=f"choose among 0 to {len(blocks) - 1}"
        )
    layers = {
        name.removesuffix(".base_layer"): block_of(name, blocks)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }
    if spec.blocks is not None:
        chosen = {blocks[index] for index in spec.blocks}
        layers = {name: block for name, block in layers.items() if block in chosen}
    matches = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in spec.targets}
    missing = [target for target, names in matches.items() if not names]
    if missing or not spec.targets:
        endings = sorted({name.removeprefix(f"{block}.") for name, block in layers.items() if block})
        raise PrflError(f"adapter targets {missing} match no linear layer", fix=f"choose among {', '.join(endings)}")
    return sorted({name for names in matches.values() for name in names})


def lora_shapes(network: nn.Module, spec: LoraSpec, lists: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Shapes of the parameters that ``add_lora`` would make, as ``adapter_parameters`` keys them."""
    shapes = {}
    for name in matching_layers(network, spec, lists):
        layer = network.get_submodule(name)
        shapes[f"{name}.lora_A.weight"] = (spec.rank, layer.in_features)
        shapes[f"{name}.lora_B.weight"] = (layer.out_features, spec.rank)
    return shapes


class LowRank(nn.Linear):
    """The A or B of an adapter: its weights take the input's type, and their gradient comes back in their own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def compute_in_input_type(layer: LoraLayer, name: str) -> None:
    layer.cast_input_dtype_enabled = False
    for factors in (layer.lora_A, layer.lora_B):
        factors[name].__class__ = LowRank


def add_lora(network: ModelMixin, name: str, spec: LoraSpec, lists: Sequence[str]) -> None:
    """Add a LoRA adapter (B = 0: the network's output does not change) with float32 master weights, which compute in
    the type of the activations; not yet active.

    lists: the names of the network's lists of blocks.  The dropout acts inside ``dropout.dropping``.
    Raises PrflError for a name that is taken or has a dot, a target that matches nothing, blocks that do not exist.
    """
    if name in adapter_names(network) or "." in name or not name:
        raise PrflError(f"'{name}' cannot be the name of a new adapter", fix="take a new name without a dot")
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=matching_layers(network, spec, lists))
    before = layer_states(lora_layers(network))
    flags = requires_grad_flags(network)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        torch.manual_seed(spec.seed)
        network.add_adapter(config, adapter_name=name)
    restore(flags)
    for parameter in adapter_parameters(network, name).values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for full_name, layer in named_lora_layers(network).items():
        if name in layer.lora_A:
            compute_in_input_type(layer, name)
            if spec.dropout:
                layer.lora_dropout[name] = SampleDropout(spec.dropout, full_name)
    network.train(network.training)  # new layers start in training mode
    flags = requires_grad_flags(network)
    put_back(lora_layers(network), before)
    restore(flags)


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's own parameters, keyed ``blocks.0.attn1.to_q.lora_A.weight`` (without the adapter's name)."""
    parameters = {
        f"{path}.{factor}.weight": getattr(layer, factor)[name].weight
        for path, layer in named_lora_layers(network).items()
        for factor in ("lora_A", "lora_B")
        if name in getattr(layer, factor)
    }
    if not parameters:
        raise PrflError(f"there is no adapter '{name}'", fix=f"the network has {adapter_names(network) or 'none'}")
    return parameters


def dropouts_of(network: nn.Module, name: str) -> list[SampleDropout]:
    """The dropout of an adapter, layer by layer; none where its rate is 0."""
    dropouts = [layer.lora_dropout[name] for layer in lora_layers(network) if name in layer.lora_dropout]
    return [dropout for dropout in dropouts if isinstance(dropout, SampleDropout)]


def state_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A copy of the weights, under the same keys."""
    return {key: value.detach().clone() for key, value in parameters.items()}


def load_state(parameters: Mapping[str, nn.Parameter], name: str, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into the parameters of the adapter ``name`` (``Backbone.parameters``).

    Raises PrflError when names or shapes differ, or values are not finite.
    """
    wrong = sorted(parameters.keys() ^ state.keys())
    wrong = wrong or [key for key in parameters if parameters[key].shape != state[key].shape]
    if wrong:
        raise PrflError(
            f"the saved adapter does not fit adapter '{name}': {len(wrong)} tensors differ, the first is {wrong[0]}",
            fix="add the adapter with the rank, targets and blocks that it was saved with",
        )
    check_finite(state, f"adapter '{name}'", "load weights that were saved whole, of a run that did not diverge")
    copy_into(parameters, state)
