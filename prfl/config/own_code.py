"""Finds a user's own function by ``module:function``, or by its name in the entry-point group ``prfl.rewards``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "prfl.rewards"


def full_name(function: str) -> str:
    """Return ``module:function``; a name without a colon is looked up among the entry points.

    Raises LookupError if there is no such entry point.
    """
    if ":" in function:
        return function
    points = {point.name: point.value for point in entry_points(group=GROUP)}
    if function not in points:
        raise LookupError(f"no installed package offers '{function}' in the entry-point group {GROUP}")
    return points[function]


def source_of(function: str) -> Path | None:
    """Find the file that defines a function, without running it; None if there is no such module.

    Raises LookupError as ``full_name`` does.
    """
    module = full_name(function).partition(":")[0]
    with _here_first():
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
    return Path(spec.origin) if spec and spec.origin and spec.has_location else None


def import_function(function: str) -> Callable[..., Any]:
    """Import a function or class.  Raises LookupError or AttributeError for none, and whatever its module raises."""
    module, _, name = full_name(function).partition(":")
    with _here_first():
        return getattr(importlib.import_module(module), name)


@contextmanager
def _here_first() -> Iterator[None]:
    """Look for modules in the current folder first, as ``python`` does and a console script does not."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
