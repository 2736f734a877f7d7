"""Reads a config file that extends another one beside it: its own keys replace those of the other file.

    extends: prfl.yaml
    rollout: {stride: 1}          # the other keys of rollout stay

Sections are merged key by key, at any depth.  Any other value, such as a list, replaces the inherited one.  A section
that chooses another kind (``objective.name``, ``reward.space``) also replaces the inherited one, because its keys
differ.  ``run`` is never inherited: two configs would write into one folder.  The extended file may not extend a
third, so a reader never has to open more than two files.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfl.config.messages import all_keys, models_in
from prfl.config.schema import Config
from prfl.config.strict_yaml import read_mapping
from prfl.utils.errors import PrflError

EXTENDS = "extends"
SECTIONS = {path for path, owner in all_keys(Config) if models_in(owner.model_fields[path.split(".")[-1]].annotation)}
TAGS = ("name", "space")  # keys that choose the kind of a section


@dataclass(frozen=True)
class Tree:
    """The keys of a config as they were read.

    keys: those of all its files, merged.  files: (path, its keys) of each file; the file whose keys win comes first.
    """

    keys: dict[str, Any]
    files: tuple[tuple[Path, dict[str, Any]], ...]

    @property
    def path(self) -> Path:
        return self.files[0][0]

    def where(self, key: str) -> str:
        """Return ``FILE: KEY``, with the file that sets the key; the first file if none does."""
        givers = [path for path, keys in self.files if _gives(keys, key)]
        return f"{givers[0] if givers else self.path}: {key}"


def read_tree(path: Path) -> Tree:
    """Read a config file and the one that it extends, and merge their keys.  Raises PrflError."""
    keys = read_mapping(path)
    if EXTENDS not in keys:
        return Tree(keys, ((path, keys),))
    other = keys.pop(EXTENDS)
    where, fix = f"{path}: {EXTENDS}", "extends: prfl.yaml, of a config in the same folder"
    if not isinstance(other, str) or Path(other).name != other or other == path.name:
        raise PrflError(f"not the name of another file beside it: {other!r}", where=where, fix=fix)
    base = path.with_name(other)
    if not base.is_file():
        raise PrflError(f"there is no {base}", where=where, fix=fix)
    inherited = read_mapping(base)
    if "stages" in inherited:
        raise PrflError(f"{base} has stages, and no sections to inherit", where=where, fix="name the file of one stage")
    if EXTENDS in inherited:
        fix = f"give {base} its whole text, or extend {inherited[EXTENDS]} here too"
        raise PrflError(f"{base} extends another file itself", where=where, fix=fix)
    inherited.pop("run", None)
    return Tree(merge(inherited, keys), ((path, keys), (base, inherited)))


def merge(inherited: dict[str, Any], keys: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Merge ``keys`` over the inherited keys of the same section.  prefix: the section's yaml path and a dot."""
    merged = copy.deepcopy(inherited)
    for key, value in keys.items():
        path, before = prefix + key, inherited.get(key)
        if path in SECTIONS and isinstance(value, dict) and isinstance(before, dict) and _same_kind(before, value):
            merged[key] = merge(before, value, f"{path}.")
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _same_kind(inherited: dict[str, Any], keys: dict[str, Any]) -> bool:
    return all(keys.get(tag, inherited.get(tag)) == inherited.get(tag) for tag in TAGS)


def _gives(keys: Any, key: str) -> bool:
    """Whether a file's keys set this key, or set a value that would contain it, such as the list of an item."""
    for part in key.replace("[", ".[").split("."):
        if not isinstance(keys, dict):
            return True
        if part not in keys:
            return False
        keys = keys[part]
    return True
