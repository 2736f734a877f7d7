"""A section's keys, handed to what is built from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from prfl.config.section import Section

T = TypeVar("T")


def build_by_name(build: Callable[..., T], section: Section, **context: Any) -> T:
    """Call ``build`` with those of the section's keys, and of ``context``, that it has parameters for.

    So a new key of a section costs the key and the parameter of that name.
    """
    parameters = inspect.signature(build).parameters
    keys = {name: getattr(section, name) for name in type(section).model_fields if name in parameters}
    return build(**keys, **{name: value for name, value in context.items() if name in parameters})
