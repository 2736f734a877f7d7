"""Models that are loaded once for each process: a copy takes a tenth of the time that loading takes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch

from prfl.backbone import Backbone, load_backbone
from prfl.backbone.adapters import block_names
from prfl.backbone.blocks import Checkpointed, checkpoint_blocks
from prfl.backbone.network import with_lists
from prfl.config.schema import Config
from prfl.data.conditions import remember
from prfl.factory import backbone as backbone_factory
from prfl.factory.backbone import build_architecture, build_backbone, keep_as_asked, policy_adapter_name

_BUILT: dict[tuple, Backbone] = {}
_SHARED: WeakKeyDictionary[torch.nn.Module, list[tuple]] = WeakKeyDictionary()


def copied(model: Backbone) -> Backbone:
    """A copy that shares tokenizer, text encoder, the conditions that it remembers, and VAE.

    A test that changes the VAE says so by ``with_own_vae``: it has more modules than the transformer.
    A module has a dozen OrderedDicts of hooks.  ``deepcopy`` takes most of its time for them, and they are empty.
    """
    text = copy.copy(model.text)  # which may free its encoder
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(copy._deepcopy_dispatch, OrderedDict, _copied_in_order)  # type: ignore[attr-defined]
        duplicate = copy.deepcopy(model, {id(model.text): text, id(model.vae): model.vae})
    check_shared(model.vae)
    _run_as_it_says(duplicate)
    return duplicate


def with_own_vae(model: Backbone) -> Backbone:
    """The model itself, with a VAE that the test may change."""
    model.networks["vae"] = copy.deepcopy(model.networks["vae"])
    return model


def check_shared(vae: torch.nn.Module) -> None:
    """Fail where a test before has changed the VAE that copies share."""
    state: list[tuple] = [(p.data_ptr(), p._version, p.dtype, p.requires_grad) for p in vae.parameters()]
    state += [(n,) for n, m in vae.named_modules() if "forward" in vars(m) or m._forward_pre_hooks or m._forward_hooks]
    assert _SHARED.setdefault(vae, state) == state, "a test changed the VAE of a copy; let it call with_own_vae"


def _run_as_it_says(model: Backbone) -> None:
    """Blocks with hooks do as the model says that their class names: that of the copied blocks, until here."""
    for network, lists in with_lists(model):
        blocks = [network.get_submodule(name) for name in block_names(network, lists)]
        if hooked := [block for block in blocks if isinstance(block, Checkpointed)]:
            for block in hooked:
                block.__class__ = type(block).__bases__[1]
            checkpoint_blocks(hooked, model.running)


def _copied_in_order(items: OrderedDict, memo: dict[int, Any]) -> OrderedDict:
    memo[id(items)] = duplicate = OrderedDict()
    for key, value in items.items():
        duplicate[copy.deepcopy(key, memo)] = copy.deepcopy(value, memo)
    return duplicate


def copied_from(folder: Path, dtype: torch.dtype = torch.float32, asks: Sequence[str] = ()) -> Backbone:
    """A copy of ``load_backbone(folder, dtype)`` that knows these asks' conditions; the folder must not change."""
    key = (load_backbone, str(folder), dtype)
    if key not in _BUILT:
        _BUILT[key] = load_backbone(folder, dtype)
    remember(_BUILT[key], asks)
    return copied(_BUILT[key])


def copied_backbone(config: Config) -> Backbone:
    """A copy of ``build_backbone(config)``, with its text encoder; a config must not name a folder that changes."""
    return _as_asked(config, copied(_built(build_backbone, config)))


def copied_architecture(config: Config) -> Backbone:
    """A copy of ``build_architecture(config)``."""
    return _as_asked(config, copied(_built(build_architecture, config)))


def _as_asked(config: Config, model: Backbone) -> Backbone:
    keep_as_asked(config, model)
    return model


def _built(build: Callable[[Config], Backbone], config: Config) -> Backbone:
    later = {"adapter": {"init"}, "checkpointing": True, "offload": True}  # a file that is read, and what is kept
    settings = config.backbone.model_dump_json(exclude=later)
    key = (build, settings, config.seed, policy_adapter_name(config), repr(config.rollout.cheaper))
    if key not in _BUILT:
        model = build(config)
        if build is build_backbone:
            model.condition([""])
        _BUILT[key] = model
    return _BUILT[key]


def copies_in_place_of_loading(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let commands take a copy of the model in ``folder``, which stays as it is; other models are loaded."""
    load = backbone_factory.load_backbone

    def copy_of(source: str | Path, *settings: Any) -> Backbone:
        if str(source) != str(folder):
            return load(source, *settings)
        key = (load, str(source), repr(settings))
        if key not in _BUILT:
            _BUILT[key] = load(source, *settings)
            if "image" not in _BUILT[key].facts.takes:  # of a first frame there is none to begin with
                _BUILT[key].condition([""])
        return copied(_BUILT[key])

    patch.setattr(backbone_factory, "load_backbone", copy_of)
