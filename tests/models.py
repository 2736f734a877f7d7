"""Models of a config, built once for each process: a copy takes a tenth of the time that loading takes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.factory import backbone as backbone_factory
from prfl.factory.backbone import build_architecture, build_backbone, policy_adapter_name

_BUILT: dict[tuple, Backbone] = {}


def copied_backbone(config: Config) -> Backbone:
    """A copy of ``build_backbone(config)``, with its text encoder; a config must not name a folder that changes."""
    return deepcopy(_built(build_backbone, config))


def copied_architecture(config: Config) -> Backbone:
    """A copy of ``build_architecture(config)``."""
    return deepcopy(_built(build_architecture, config))


def _built(build: Callable[[Config], Backbone], config: Config) -> Backbone:
    settings = config.backbone.model_dump_json(exclude={"adapter": {"init"}})  # a file that is read later
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

    def copied(source: str | Path, *settings: Any) -> Backbone:
        if str(source) != str(folder):
            return load(source, *settings)
        key = (load, str(source), repr(settings))
        if key not in _BUILT:
            _BUILT[key] = load(source, *settings)
        return deepcopy(_BUILT[key])

    patch.setattr(backbone_factory, "load_backbone", copied)
