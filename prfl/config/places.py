"""Finds the files that a config names, and configs themselves.

A key that names something to read (``place`` in section.py) is looked up from the current folder first, then from the
config's folder.  What a run writes (``run``, ``data.cache``) is always relative to the current folder.  A config that
is not in the current folder may be the name of one of the configs that come with prfl.
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
INSIDE = ("shapes", "shapes-untrained", "shapes-answers")  # values that name files inside the package, not paths
PACKAGE = Path(__file__).parents[1]


def shipped_configs() -> Path:
    """Return the folder of the configs that come with prfl: inside the package if installed, beside it in a clone."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def find_config(path: str | Path) -> Path:
    """Return the path if it exists, or else that of the config of prfl with this name (tiny.yaml, configs/tiny.yaml).

    Raises PrflError if there is neither, with the names of the configs that come with prfl.
    """
    path, folder = Path(path), shipped_configs()
    if os.path.exists(path):  # False for a name that is too long, where Path.exists raises
        return path
    name = path.relative_to("configs") if path.is_relative_to("configs") else path
    if not path.is_absolute() and (folder / name).is_file() and ".." not in name.parts:
        return folder / name
    names = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*.yaml"))]
    near = closest(name.as_posix(), names)
    stories = ", ".join([n for n in names if "/" not in n] + [n for n in names if n.endswith("/prfl.yaml")])
    fix = f"give a config: your own, or one that prfl brings, as {stories}; all are in {folder}"
    error = absent(path, fix)
    if near and error.fix == fix:  # no file in its folder has a similar name
        error = absent(path, f"did you mean prfl's own {near}? Else {fix}")
    raise error


def named_files(keys: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (yaml path, its value) of every key that names something to read; for a list, one pair for each item."""
    for key in sorted(READ_KEYS):
        section = _section(keys, key)
        value = section.get(key.rpartition(".")[2]) if section else None
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name not in INSIDE:
                yield key, name


def beside(name: str, folder: Path) -> Path | None:
    """Return where a file would be in the config's folder; None if that is not a second place to look."""
    path = Path(name)
    if path.is_absolute() or name.startswith("~") or folder == Path():
        return None
    return Path(os.path.normpath(folder / path))


def found_beside(keys: dict[str, Any], folder: Path, overridden: Sequence[str] = ()) -> dict[str, Any]:
    """Return a config's keys, with the files that exist only in its folder given as paths from the current folder.

    overridden: yaml paths set on the command line; their files are looked up in the current folder alone.
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
    """Return (yaml path, path beside the config) of a file that was looked up there too; None if it was not."""
    for key, named in named_files(read_tree(config).keys):
        if Path(named) == Path(name) and (other := beside(named, config.parent)):
            return key, other
    return None


def both_places(config: Path, error: AbsentError) -> PrflError | None:
    """Return the error of an absent file with its key and both paths that were tried; None if only one was."""
    sought = other_place(config, error.path)
    if sought is None:
        return None
    key, other = sought
    return PrflError(f"{error.what}: {error.path}, nor {other}", where=f"{config}: {key}", fix=error.fix)


def _section(keys: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the section that a key is in; None if the config does not have that section."""
    section: Any = keys
    for part in key.split(".")[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None
