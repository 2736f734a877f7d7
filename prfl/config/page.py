"""Writes docs/configuration.md, the page of all config keys, from the schema: ``prfl schema docs/configuration.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from prfl.config.messages import models_in, tag_of
from prfl.config.schema import Config, StagesConfig
from prfl.config.section import SEEDS

INTRODUCTION = """\
# Configuration

Every key of a config, from the schema: `prfl schema docs/configuration.md` writes this page, and a test compares it.
A config is strict: an unknown key is an error that names the nearest one. *Required* keys have no default. Keys marked
*may change* may differ when a run goes on; all others are part of what the run is. On the command line a key is changed
without editing the file: `prfl train CONFIG training.steps=10`.

`extends: prfl.yaml` takes the keys of the config beside it, and the file gives those that differ. A file with `stages`
instead runs several configs in turn, and a later one finds an earlier one's folder as `${stages.NAME.run}`. Sizes of
memory are in GiB, times in seconds, videos in frames, pixels and frames a second.
"""
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text", "null": "null"}


def configuration_page() -> str:
    """Return the whole page.  Keys that several members of a union share are described once."""
    written: set[str] = set()
    sections = [*_section(Config, "", "A stage", written), *_section(StagesConfig, "", "Several stages", set())]
    return "".join([INTRODUCTION, *sections])


def _section(model: type[BaseModel], prefix: str, title: str, written: set[str]) -> Iterator[str]:
    """Yield a heading, a line for each key of a section, and the sections below it, each with a heading of its own."""
    schema = model.model_json_schema()
    lines = [
        _line(prefix + name, key, name in schema.get("required", ())) for name, key in schema["properties"].items()
    ]
    fresh = [line for line in lines if line not in written]
    repeated = [line.split("**")[1] for line in lines if line in written]
    written.update(fresh)
    if fresh:
        yield f"\n{'##' if prefix.count('.') <= 1 else '###'} {title}\n\n"
        yield from fresh
        if repeated:
            yield f"- As above: {', '.join(repeated)}.\n"

    for name, field in model.model_fields.items():
        choices = models_in(field.annotation)
        for choice in choices:
            tag = tag_of(choice) if len(choices) > 1 else None
            path = f"{prefix}{name}"
            yield from _section(choice, f"{path}.", f"{path}, {tag[0]}: {tag[1]}" if tag else path, written)


def _line(path: str, key: Mapping[str, Any], required: bool) -> str:
    may_change = ", *may change*" if key.get("may_change") else ""
    kind = _kind(key)
    default = "*required*" if required else f"default `{json.dumps(key['default'])}`"
    return f"- **`{path}`** ({', '.join(filter(None, (kind, default)))}{may_change}): {key['description']}\n"


def _kind(key: Mapping[str, Any]) -> str:
    """Say what a value may be: its choices, or its type and bounds; "" for a section."""
    if "anyOf" in key:
        kinds = [_kind(choice) for choice in key["anyOf"]]
        if "" in kinds and set(kinds) <= {"", "null"}:
            return ""
        return " or ".join(kind or "keys of its own" for kind in kinds)
    if "enum" in key or "const" in key:
        return " or ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in key.get("enum", [key.get("const")]))
    if key.get("type") == "array":
        return f"list ({_kind(key.get('items', {})) or 'values'})"
    if key.get("format") == "path":
        return "path"
    limits = {bound: "2^63" if key[bound] == SEEDS else key[bound] for bound in BOUNDS if bound in key}
    bounds = " and ".join(f"{BOUNDS[bound]} {limit}" for bound, limit in limits.items())
    return f"{NAMES.get(key.get('type', ''), '')} {bounds}".strip()
