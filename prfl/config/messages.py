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
"""The types of pydantic's errors for a value that is not the plain number, text or choice that its key takes."""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in an annotation: none, one, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def takes_both(annotation: Any) -> bool:
    """Whether a key takes either a section or a plain value, such as one number or {high: ..., low: ...}."""
    others = [part for part in typing.get_args(annotation) if part is not type(None) and not models_in(part)]
    return bool(others) and len(models_in(annotation)) == 1


def tag_of(model: type[BaseModel]) -> tuple[str, str] | None:
    """Return the (key, value) that chooses this member of a union, e.g. ("name", "prfl"); None if it has none."""
    for key in ("name", "space"):
        if key in model.model_fields:
            return key, typing.get_args(model.model_fields[key].annotation)[0]
    return None


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (yaml path, the section class that defines it) of every key, in all members of unions."""
    for name, field in model.model_fields.items():
        yield prefix + name, model
        for inner in models_in(field.annotation):
            yield from all_keys(inner, f"{prefix}{name}.")


def locate(root: type[BaseModel], loc: Sequence[int | str]) -> tuple[str, type[BaseModel]]:
    """Turn pydantic's location into (yaml path, the section class of its last key); union tags are left out."""
    path, owner, models, annotation, chooses = "", root, [root], None, False
    for part in loc:
        if chooses:  # this part says as which of the two, section or plain value, pydantic tried the input
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
    """Return ". Did you mean 'CHOICE'?" with the closest choice, to append to a sentence; "" if none is close."""
    match = closest(word, choices)
    return f". Did you mean '{match}'?" if match else ""


def unknown_key(root: type[BaseModel], path: str, owner: type[BaseModel]) -> str:
    """Say that a key is unknown, and what was probably meant.  owner: the section class that it was written in."""
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
    """Return the refused value as JSON, cut to 80 characters."""
    text = json.dumps(error["input"], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def describe(root: type[BaseModel], error: ErrorDetails) -> Fault:
    """Turn one error of pydantic into (yaml path, what is wrong there)."""
    path, owner = locate(root, error["loc"])
    context: Mapping[str, Any] = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return path, unknown_key(root, path, owner)
        case "missing":
            missing = owner.model_fields.get(str(error["loc"][-1]))
            return path, f"missing ({missing.description})" if missing else "missing"  # no field: an item of a list
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
    """Whether pydantic tried a key that takes a section or a plain value as the kind that was not meant."""
    loc = error["loc"]
    others = [other for other in errors if other is not error and other["loc"][: len(loc) - 1] == loc[:-1]]
    of_section = error["type"] == "model_type"
    return bool(others) and (of_section or isinstance(error["input"], dict) and error["type"] in PLAIN_TYPES)


def faults(root: type[BaseModel], errors: Sequence[ErrorDetails]) -> list[Fault]:
    """Return one fault for each yaml path; several errors of one key are alternatives, joined by 'or'."""
    lines: dict[str, list[str]] = {}
    for error in errors:
        path, what = describe(root, error)
        if is_other_try(error, errors):
            continue
        lines.setdefault(path, []).append(what)
    return [(path, "; or ".join(whats)) for path, whats in lines.items()]
