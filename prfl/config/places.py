"""Where the files that a config names are: from the current folder, or else from the config's own.

A key that says what is read (``place`` in section.py) may name its file either way, and the current folder goes first.
What a run writes (``run``, ``data.cache``) is always the current folder's.  A config that is not there itself may be
one of those that come with prfl.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prfl.config.extends import read_tree
from prfl.config.messages import all_keys
from prfl.config.schema import Config
from prfl.config.section import READ
from prfl.utils.errors import AbsentError, PrflError
from prfl.utils.reading import absent
from prfl.utils.text import closest

READ_KEYS = {
    key for key, owner in all_keys(Config) if owner.model_fields[key.rpartition(".")[2]].json_schema_extra == READ
}
INSIDE = ("shapes", "shapes-untrained", "shapes-answers")  # words for what lies inside the package
PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> Path:
    """The folder of the configs that come with prfl: inside a wheel, or beside the package in a clone."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str | Path) -> Path:
    """A config that is there, or the one of that name that comes with prfl, as tiny.yaml or configs/tiny.yaml.

    Raises PrflError for any other, with the names of those that come with it.
    """
    path, folder = Path(path), shipped_configs()
    if os.path.exists(path):  # a name too long is none
        return path
    name = path.relative_to("configs") if path.is_relative_to("configs") else path
    if not path.is_absolute() and (folder / name).is_file() and ".." not in name.parts:
        return folder / name
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.yaml"))]
    near = closest(name.as_posix(), names)
    stories = ", ".join([n for n in names if "/" not in n] + [n for n in names if n.endswith("/prfl.yaml")])
    fix = f"give a config: your own, or one that prfl brings, as {stories}; all are in {folder}"
    error = absent(path, fix)
    if near and error.fix == fix:  # nothing beside it is spelt nearly so
        error = absent(path, f"did you mean prfl's own {near}? Else {fix}")
    raise error


def named_files(keys: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(yaml path, what it names) of every key that names what is read, and of every item where that is a list."""
    for key in sorted(READ_KEYS):
        section = _section(keys, key)
        value = section.get(key.rpartition(".")[2]) if section else None
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name not in INSIDE:
                yield key, name


def beside(name: str, folder: Path) -> Path | None:
    """The other place where a config's folder would have a file; None where there is no other."""
    path = Path(name)
    if path.is_absolute() or name.startswith("~") or folder == Path():
        return None
    return Path(os.path.normpath(folder / path))


def found_beside(keys: dict[str, Any], folder: Path, overridden: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a config, with the files that only its own folder has named from the current one.

    overridden: yaml paths from the command line, where a file is the current folder's.
    """
    moved = {}
    for key, name in named_files(keys):
        other = beside(name, folder)
        of_command = any(f"{key}.".startswith(f"{override}.") for override in overridden)
        if other and not of_command and not os.path.exists(name) and os.path.exists(other):
            moved[key, name] = str(other)
    if not moved:
        return keys
    keys = copy.deepcopy(keys)
    for key in {key for key, _ in moved}:
        section, last = _section(keys, key) or {}, key.rpartition(".")[2]
        value = section[last]
        section[last] = [moved.get((key, v), v) for v in value] if isinstance(value, list) else moved[key, value]
    return keys


def other_place(config: Path, name: str | Path) -> tuple[str, Path] | None:
    """(yaml path, place) where a file that a config names was sought beside the config; None where it was not."""
    for key, named in named_files(read_tree(config).keys):
        if Path(named) == Path(name) and (other := beside(named, config.parent)):
            return key, other
    return None


def both_places(config: Path, error: AbsentError) -> PrflError | None:
    """The error of a file that a config names, with its key and the other place where it was sought, if any."""
    sought = other_place(config, error.path)
    if sought is None:
        return None
    key, other = sought
    return PrflError(f"{error.what}: {error.path}, nor {other}", where=f"{config}: {key}", fix=error.fix)


def _section(keys: dict[str, Any], key: str) -> dict[str, Any] | None:
    """The section of a key; None where the config has none."""
    section: Any = keys
    for part in key.split(".")[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None
