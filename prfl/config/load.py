"""Reads a config file strictly, with ``key=value`` overrides; writes and compares resolved configs.

Paths of what a config reads are relative to the current directory, or else to the config's folder (places.py).  Paths
of what it writes are always relative to the current directory.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from prfl.config.extends import Tree, read_tree
from prfl.config.messages import all_keys, faults
from prfl.config.places import find_config, found_beside
from prfl.config.rules import conflicts
from prfl.config.schema import Config
from prfl.config.section import MAY_CHANGE, READ, WRITTEN, Fault
from prfl.config.strict_yaml import parse, read_mapping
from prfl.utils.errors import PrflError
from prfl.utils.hashing import json_hash

REFERENCE = re.compile(r"\$\{([^}]*)\}?")
AnySection = TypeVar("AnySection", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config of one stage.  ``${stages.NAME.run}`` in it is the run folder of NAME.yaml beside it.

    overrides: ``training.steps=10``; the value is YAML.  Raises PrflError with the yaml path.
    """
    path = find_config(path)
    tree = read_tree(path)
    if "stages" in tree.keys:
        raise PrflError("it has several stages", where=str(path), fix="name the file of one stage")
    return config_from(tree, overrides, stage_runs=None)


def config_from(tree: Tree, overrides: Sequence[str], stage_runs: Mapping[str, Path] | None) -> Config:
    """Validate the keys of a config with their overrides.  Raises PrflError with every fault.

    stage_runs: the run folders of the earlier stages by name; None if the config is loaded by itself.
    """
    keys = copy.deepcopy(tree.keys)
    overridden = [set_key(keys, override) for override in overrides]
    keys = found_beside(keys, tree.path.parent, overridden)
    config = validate(Config, resolve(keys, tree, stage_runs, ""), tree, overridden)
    report(tree, list(conflicts(config)), overridden)
    return config


def validate(section: type[AnySection], keys: Any, tree: Tree, overridden: Sequence[str] = ()) -> AnySection:
    """Build a section from its keys.  tree: the files that the keys come from.  Raises PrflError with every fault."""
    try:
        # Through JSON, pydantic's strict mode still reads a list as a tuple and text as a path, and nothing else.
        return section.model_validate_json(json.dumps(keys), strict=True)
    except ValidationError as error:
        report(tree, faults(section, error.errors()), overridden)
        raise


def report(tree: Tree, broken: Sequence[Fault], overridden: Sequence[str]) -> None:
    """Raise one PrflError that lists every fault, each with the file or the command line that set the key."""

    def where(key: str) -> str:
        inside = key.replace("[", ".[") + "."
        by_override = any(inside.startswith(f"{other}.") or f"{other}.".startswith(inside) for other in overridden)
        return f"command line: {key}" if by_override else tree.where(key)

    if broken:
        more = [f"\n{where(key)}: {what}" for key, what in broken[1:]]
        raise PrflError(broken[0][1] + "".join(more), where=where(broken[0][0]), fix="")  # each says what it should be


def set_key(tree: dict[str, Any], override: str) -> str:
    """Set the key of an override ``a.b.c=value`` in the tree, and return ``a.b.c``.  Raises PrflError."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise PrflError("not of the form key=value", where=f"command line: {override}", fix="training.steps=10")
    for part in parts[:-1]:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            raise PrflError(
                f"'{part}' has no keys below it",
                where=f"command line: {key}",
                fix="name a key of a section, as training.steps=100",
            )
    tree[parts[-1]] = parse(text, f"command line: {key}")
    return key


def resolve(value: Any, tree: Tree, stage_runs: Mapping[str, Path] | None, key: str) -> Any:
    """Return a value with every ``${stages.NAME.run}`` in its texts replaced.  key: its yaml path, "" for a config."""
    if isinstance(value, dict):
        return {name: resolve(v, tree, stage_runs, f"{key}.{name}".removeprefix(".")) for name, v in value.items()}
    if isinstance(value, list):
        return [resolve(item, tree, stage_runs, f"{key}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, str):
        return REFERENCE.sub(lambda reference: str(stage_run(reference[0], tree, stage_runs, key)), value)
    return value


def stage_run(reference: str, tree: Tree, stage_runs: Mapping[str, Path] | None, key: str) -> Path:
    """Return the run folder that a reference at a key names.  Raises PrflError if there is none."""
    where = tree.where(key)
    form = re.fullmatch(r"\$\{stages\.([^./]+)\.run\}", reference)
    if form is None:
        raise PrflError(f"cannot resolve {reference}", where=where, fix="the one form is ${stages.NAME.run}")
    name = form[1]
    if stage_runs is not None:
        if name not in stage_runs:
            earlier = ", ".join(stage_runs) or "none; this is the first"
            raise PrflError(f"no earlier stage is called '{name}'", where=where, fix=f"earlier stages: {earlier}")
        return stage_runs[name]
    beside = tree.path.with_name(f"{name}.yaml")
    if not beside.is_file():
        raise PrflError(f"no earlier stage '{name}', and no {beside}", where=where, fix=f"give {key} a folder")
    run = read_mapping(beside).get("run")
    if not isinstance(run, str) or REFERENCE.search(run):
        raise PrflError("missing, or not the name of a folder", where=f"{beside}: run", fix="run: runs/my-run")
    return Path(run)


def dump_resolved(config: Config) -> str:
    """Write the config as YAML with every default spelt out; reading it again gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Config) -> str:
    """Hash ``identity``: two configs with the same hash may resume each other's runs."""
    return json_hash(identity(config))[:16]


def identity(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Return {yaml path: json-able value} of all keys that must stay the same when a run is resumed.

    Left out are keys that may change, and paths: of these the contents are compared (factory/resume_identity.py).
    """
    values: dict[str, Any] = {}
    dumped = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        if field.json_schema_extra in (MAY_CHANGE, READ, WRITTEN):
            continue
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            values |= identity(inner, f"{prefix}{name}.")
        else:
            values[prefix + name] = dumped[name]
    return values


def is_default(key: str, value: Any) -> bool:
    """Whether a json-able value is the default of a key, given by its yaml path."""
    fields = [section.model_fields[key.rpartition(".")[2]] for path, section in all_keys(Config) if path == key]
    defaults = [f.get_default(call_default_factory=True) for f in fields if not f.is_required()]
    return value in to_jsonable_python(defaults)
