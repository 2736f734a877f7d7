"""Which implementation of an operation runs: an explicit choice, else the variable PRFL_KERNELS, else automatic.

A choice that cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

VARIABLE = "PRFL_KERNELS"
REQUESTS = ("auto", "torch", "triton")
TRITON_KERNELS: frozenset[str] = frozenset()  # names of the operations that have one; none is written yet


class Choice(NamedTuple):
    backend: str  # "torch" or "triton"
    reason: str  # one line for the log


def choose_backend(operation: str, request: str | None = None) -> Choice:
    """request: "torch", "triton", or "auto" (None is auto), which leaves it to the variable PRFL_KERNELS, then to us.

    Raises ValueError for an unknown request, and for "triton" where it cannot run.
    """
    source = "chosen explicitly"
    if request in (None, "auto"):
        request, source = os.environ.get(VARIABLE) or "auto", f"chosen by {VARIABLE}"
    if request not in REQUESTS:
        raise ValueError(f"{source}: '{request}' is none of {', '.join(REQUESTS)}")
    if request == "torch":
        return Choice("torch", source)
    obstacle = _obstacle(operation)
    if request == "auto":
        return Choice("torch", f"automatic: {obstacle}") if obstacle else Choice("triton", "automatic")
    if obstacle:
        raise ValueError(f"triton, {source}, cannot run {operation}: {obstacle}; choose torch or auto")
    return Choice("triton", source)


def _obstacle(operation: str) -> str:
    """Why the Triton kernel of an operation cannot run here; empty when it can."""
    if operation not in TRITON_KERNELS:
        return f"there is no Triton kernel for {operation} yet"
    if find_spec("triton") is None:
        return "triton is not installed"
    return ""
