"""One entry of the cache: a safetensors file with metadata, by which it is checked when it is read.

The metadata are: ``made_from``, the JSON of everything that the content depends on, whose hash is the file's name;
``content``, a hash of the tensors; and, for people, the video's name and clip, or the prompt.  Entries of earlier
versions have only what is for people: they are checked by that and by the shapes of their tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write, disk_errors

_read_before: dict[Path, tuple[int, int]] = {}  # size and mtime (ns) of entries that this process has checked


@dataclass(frozen=True)
class Form:
    """What all entries of one kind (videos, or prompts) have in common.

    of: what an entry is made from (``video`` or ``prompt``).  facts: everything else that its content depends on.
    fault: a function that says what is wrong with an entry's tensors, or "".
    """

    of: str
    facts: Mapping[str, Any]
    fault: Callable[[Mapping[str, Tensor]], str]

    def made_from(self, source: str | list[Any]) -> str:
        """Write all that an entry's content depends on as JSON.

        source: the video's hash, or the prompt, or a list of the prompt, its first frame's hash and its clip.
        """
        return json.dumps([source, *self.facts.values()], sort_keys=True)


def entry_name(made_from: str) -> str:
    """Name an entry by the hash of what it is made from."""
    return hashlib.sha256(made_from.encode()).hexdigest()[:32]


def write_entry(file: Path, tensors: Mapping[str, Tensor], made_from: str, notes: Mapping[str, str]) -> None:
    """Write an entry with its metadata.  notes: metadata for people, such as the video's name."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = {**notes, "made_from": made_from, "content": content_of(on_host)}
    data = save(on_host, metadata=facts)
    with atomic_write(file) as temporary:
        temporary.write_bytes(data)


def read_entry(file: Path, form: Form, prompt: str | None = None) -> tuple[dict[str, Tensor], bool]:
    """Read an entry: (its tensors, whether it carries a hash of them).

    Raises PrflError for an entry that is not what its name says, is damaged, or has values that are not finite.
    """
    fix = "run `prfl cache` with the same config: it puts the entry aside and encodes anew"
    try:
        with safe_open(file, framework="pt") as opened:
            notes = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        status = file.stat()
    except FileNotFoundError as error:
        raise PrflError("there is no such entry", where=str(file), fix=fix) from error
    except Exception as error:  # safetensors and torch have a dozen kinds for what a file can be
        raise PrflError(f"is damaged: {str(error) or type(error).__name__}", where=str(file), fix=fix) from error

    # The content is checked once per process, and again only if the file has changed.
    fault = _other_maker(file, notes, form, prompt) or form.fault(tensors)
    stamp = status.st_size, status.st_mtime_ns
    if not fault and _read_before.get(file.absolute()) != stamp:
        infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if infinite:
            fault = f"its {infinite[0]} are not finite"
        elif "content" in notes and notes["content"] != content_of(tensors):
            fault = "its content is not what was written"

    if fault:
        raise PrflError(f"is damaged: {fault}", where=str(file), fix=fix)
    _read_before[file.absolute()] = stamp
    return tensors, "content" in notes


def put_aside(file: Path) -> None:
    """Rename a damaged entry to KEY.damaged, where it is not looked for; another run may have done so before."""
    aside = file.with_suffix(".damaged")
    with disk_errors(file), suppress(FileNotFoundError):
        if file.is_dir() or aside.is_dir():  # os.replace cannot put a file in place of a folder, nor the reverse
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)
        os.replace(file, aside)


def content_of(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _other_maker(file: Path, notes: Mapping[str, str], form: Form, prompt: str | None) -> str:
    """Say what in an entry's metadata differs from what its name promises, or ""."""
    if "made_from" not in notes:
        return _older(notes, form, prompt)
    if entry_name(notes["made_from"]) == file.stem:
        return ""

    try:
        _, *facts = json.loads(notes["made_from"])
    except (ValueError, TypeError):
        return "its metadata cannot be read"
    for (name, ours), theirs in zip(form.facts.items(), facts, strict=False):
        if theirs != ours:
            return f"it is of another {name}: {_difference(theirs, ours)}"
    return f"it is of another {form.of}"


def _older(notes: Mapping[str, str], form: Form, prompt: str | None) -> str:
    """Do the same for an entry of an earlier version, which has no ``made_from``."""
    if "clip" in form.facts:
        if notes.get("clip") == json.dumps(form.facts["clip"]):
            return ""
        return f"it is of another clip: {notes['clip'][:200]}" if "clip" in notes else "it does not say what it is"
    if "prompt" not in notes:
        return "it does not say what it is"
    return "" if notes["prompt"] == prompt else "it is of another prompt"


def _difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in {**ours, **theirs}:
            if theirs.get(name) != ours.get(name):
                return f"{name} {theirs.get(name)}, not {ours.get(name)}"
    return f"{theirs}, not {ours}"
