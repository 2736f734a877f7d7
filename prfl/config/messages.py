"""Turns pydantic's errors into lines that name the yaml path and the likely remedy."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from prfl.config.section import Fault, Section
from prfl.utils.text import closest

PLAIN_TYPES = ("literal_error", "float_type", "int_type", "bool_type", "string_type")
"""Of pydantic's errors, those that say that a value is no plain one of its kind."""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation may hold: one, none, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def takes_both(annotation: Any) -> bool:
    """Whether a key takes a section or something else, as one number or one for each of two."""
    others = [part for part in typing.get_args(annotation) if part is not type(None) and not models_in(part)]
    return bool(others) and len(models_in(annotation)) == 1


def tag_of(model: type[BaseModel]) -> tuple[str, str] | None:
    """(key, value) that tells a member of a union from the others, e.g. ("name", "prfl")."""
    for key in ("name", "space"):
        if key in model.model_fields:
            return key, typing.get_args(model.model_fields[key].annotation)[0]
    return None


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(yaml path, section that has it) of every key."""
    for name, field in model.model_fields.items():
        yield prefix + name, model
        for inner in models_in(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")


def locate(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """pydantic's location as (yaml path, the section that holds its last key); union tags are left out."""
    path, owner, models, annotation, chooses = "", root, [root], None, False
    for part in loc:
        if chooses:  # which of the two it was tried as
            chooses = False
        elif isinstance(part, int):
            path += f"[{part}]"
        elif len(models) > 1:  # a union: this part is the tag of the member that was chosen
            models = [model for model in models if (tag_of(model) or ("", ""))[1] == part]
        elif models:
            owner = models[0]
            path += f".{part}"
            field = owner.model_fields.get(part)
            annotation = field.annotation if field else None
            models, chooses = models_in(annotation), takes_both(annotation)
        elif dict in {typing.get_origin(a) for a in (annotation, *typing.get_args(annotation))}:
            path += f".{part}"
    return path.removeprefix("."), owner


def hint_of(word: object, choices: Sequence[str]) -> str:
    """Ask for the closest choice, behind another sentence; "" where no choice is close."""
    match = closest(word, choices)
    return f". Did you mean '{match}'?" if match else ""


def unknown_key(root: type[BaseModel], path: str, owner: type[BaseModel]) -> str:
    key = path.rpartition(".")[2]
    if issubclass(owner, Section) and key in owner.instead:
        return f"unknown key; {owner.instead[key]}"
    elsewhere = [(other, model) for other, model in all_keys(root) if other.rpartition(".")[2] == key]
    tags = [tag for other, model in elsewhere if other == path and (tag := tag_of(model))]
    if tags:
        return f"unknown key; it belongs to {tags[0][0]}: {' or '.join(value for _, value in tags)}"
    if hint := hint_of(key, list(owner.model_fields)):
        return f"unknown key{hint}"
    if elsewhere:
        return f"unknown key. Did you mean '{elsewhere[0][0]}'?"
    return f"unknown key; the keys here are {', '.join(owner.model_fields)}"


def shown(error: ErrorDetails) -> str:
    """The value that was given, as YAML would write it, cut where it is long."""
    text = json.dumps(error["input"], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(root: type[BaseModel], error: ErrorDetails) -> Fault:
    path, owner = locate(root, error["loc"])
    context: Mapping[str, Any] = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return path, unknown_key(root, path, owner)
        case "missing":
            missing = owner.model_fields.get(str(error["loc"][-1]))
            return path, f"missing ({missing.description})" if missing else "missing"  # of a list, or of a section
        case "union_tag_not_found":
            return f"{path}.{context['discriminator'].strip(chr(39))}", "missing; it says which keys belong here"
        case "union_tag_invalid":
            tags = context["expected_tags"].replace("'", "")
            hint = hint_of(context["tag"], tags.split(", "))
            return f"{path}.{context['discriminator'].strip(chr(39))}", f"'{context['tag']}' is none of {tags}{hint}"
        case "literal_error":
            expected = context["expected"].replace("'", "")
            hint = hint_of(error["input"], expected.replace(" or ", ", ").split(", "))
            return path, f"should be {expected}, got {shown(error)}{hint}"
    return path, f"{error['msg'].removeprefix('Input ').removeprefix('Value error, ')}, got {shown(error)}"


def is_other_try(error: ErrorDetails, errors: Sequence[ErrorDetails]) -> bool:
    """Whether it is of the kind that a value was not meant as, where a key takes a section or something else."""
    loc = error["loc"]
    others = [other for other in errors if other is not error and other["loc"][: len(loc) - 1] == loc[:-1]]
    of_section = error["type"] == "model_type"
    return bool(others) and (of_section or isinstance(error["input"], dict) and error["type"] in PLAIN_TYPES)


def faults(root: type[BaseModel], errors: Sequence[ErrorDetails]) -> list[Fault]:
    """One line per yaml path; the alternatives of one key are joined by 'or'."""
    lines: dict[str, list[str]] = {}
    for error in errors:
        path, what = describe(root, error)
        if is_other_try(error, errors):
            continue
        lines.setdefault(path, []).append(what)
    return [(path, "; or ".join(whats)) for path, whats in lines.items()]
