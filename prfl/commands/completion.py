"""What a shell completes behind ``prfl``: options by argcomplete, and configs and their keys by these functions."""

from __future__ import annotations

import argparse
import typing
from typing import Any

TURNED_ON = "_ARGCOMPLETE"  # in the environment of a completing shell


def complete(parser: argparse.ArgumentParser) -> None:
    """Write what the shell asks for, and end the process."""
    import argcomplete

    argcomplete.autocomplete(parser)


def configs(prefix: str, **_: Any) -> list[str]:
    """The yaml files that begin so, and those that come with prfl."""
    from argcomplete.completers import FilesCompleter

    from prfl.config.places import shipped_configs

    folder = shipped_configs()
    shipped = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.yaml"))]
    return [*FilesCompleter(("yaml",))(prefix), *(name for name in shipped if name.startswith(prefix))]


def overrides(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """``key=`` of every key that may be changed, then its values where there are few; stages come first in a story."""
    stages = _stages(parsed_args.config)
    stage = next((f"{name}." for name in stages if prefix.startswith(f"{name}.")), "")
    if stages and not stage:
        return [f"{name}." for name in stages]
    key, equals, _text = prefix.removeprefix(stage).partition("=")
    keys = _keys()
    if equals:
        return [f"{stage}{key}={value}" for value in keys.get(key, [])]
    return [f"{stage}{name}=" for name in keys]


def _stages(config: str) -> list[str]:
    """The names of a config's stages; none where it is an ordinary one, or cannot be read."""
    from prfl.config import load_stages
    from prfl.utils.errors import PrflError

    try:
        names = [stage.name for stage in load_stages(config)]
    except PrflError:
        return []
    return names if len(names) > 1 else []


def _keys() -> dict[str, list[str]]:
    """The values of every key that holds no section: those of a choice, true and false, else none."""
    from prfl.config.messages import all_keys, models_in
    from prfl.config.schema import Config

    keys: dict[str, list[str]] = {}
    for key, owner in all_keys(Config):
        annotation = owner.model_fields[key.rpartition(".")[2]].annotation
        if not models_in(annotation):
            keys[key] = keys.get(key, []) + [v for v in _values(annotation) if v not in keys.get(key, [])]
    return keys


def _values(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    if annotation is type(None):
        return ["null"]
    inner = typing.get_args(annotation) if typing.get_origin(annotation) is not list else ()
    return [value for part in inner for value in _values(part)]
