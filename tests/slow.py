"""Which values of a parametrized test a plain ``pytest`` runs.  ``pytest -m ''`` runs them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(kept: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """Values for ``pytest.mark.parametrize``: those that are not kept are marked ``slow``.

    kept: asked of each value; of a tuple, which is several arguments, as a whole.
    """
    marked = []
    for value in values:
        arguments = value if isinstance(value, tuple) else (value,)
        marked.append(value if kept(value) else pytest.param(*arguments, marks=pytest.mark.slow))
    return marked
