"""Which implementation of an operation runs: an explicit choice, else the variable PRFL_KERNELS, else automatic.

A choice that cannot run is an error, never a silent fallback.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from prfl_kernels.passed import passed

VARIABLE = "PRFL_KERNELS"
REQUESTS = ("auto", "torch", "triton")
OPERATIONS = ("lora_linear", "qk_norm_rope", "gated_residual_norm", "attention")  # that have a Triton kernel
# What automatic takes where its compiled tests have passed (``passed``), and why.  By counts: nothing is timed yet.
AUTOMATIC = {
    "qk_norm_rope": "an eighth of an eager block's bytes are moved; of a compiled one's about all",
    "gated_residual_norm": "a sixth of an eager block's bytes are moved; of a compiled one's about all",
    "lora_linear": "for its memory, not for its speed",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)


def runs_triton(x: Tensor) -> bool:
    """Tell whether a Triton kernel takes this tensor.  One without elements is torch's: there is nothing to launch."""
    return (x.is_cuda or interpreting()) and x.numel() > 0


def refuse_forward_mode(operation: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError where one has a forward-mode tangent: an operator would drop it without a word."""
    for tensor in tensors:
        if tensor is not None and unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{operation} has no derivative in forward mode: use prfl_kernels.reference")


class Choice(NamedTuple):
    backend: str  # "torch" or "triton"
    reason: str  # one line for the log


def interpreting() -> bool:
    """Tell whether Triton runs its kernels in Python, on the CPU: the variable counts as it was at triton's import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(
    operation: str,
    request: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """Choose what runs an operation, and say why.

    request: "torch", "triton", or "auto" (None is auto), which leaves it to the variable PRFL_KERNELS, then to us.
    device, dtype: where the operation will run.
    Raises ValueError for an unknown operation or request, and for "triton" where it cannot run.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"'{operation}' is none of {', '.join(OPERATIONS)}")

    source = "chosen explicitly"
    if request in (None, "auto"):
        request, source = os.environ.get(VARIABLE) or "auto", f"chosen by {VARIABLE}"
    if request not in REQUESTS:
        raise ValueError(f"{source}: '{request}' is none of {', '.join(REQUESTS)}")
    if request == "torch":
        return Choice("torch", source)

    obstacle = _obstacle(operation, torch.device(device), dtype)
    if request == "auto":
        if not obstacle and operation not in AUTOMATIC:
            obstacle = "not yet shown to be faster on a GPU; choose triton to have it"
        elif not obstacle and operation not in passed(device):
            obstacle = (
                "its compiled tests have not passed on this machine: pytest tests/kernels/triton, or choose triton"
            )
        if obstacle:
            return Choice("torch", f"automatic: {obstacle}")
        return Choice("triton", f"automatic: its compiled tests have passed here; {AUTOMATIC[operation]}")

    if obstacle:
        raise ValueError(f"triton, {source}, cannot run {operation}: {obstacle}; choose torch or auto")
    return Choice("triton", source)


def _obstacle(operation: str, device: torch.device, dtype: torch.dtype) -> str:
    """Say why the Triton kernel of an operation cannot run here; empty when it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if interpreting():
        return ""
    if device.type != "cuda":
        return f"it needs a GPU, and this runs on {device.type}"
    if dtype not in DTYPES:
        return f"it takes {', '.join(str(allowed).removeprefix('torch.') for allowed in DTYPES)}, not {dtype}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < CAPABILITY:  # or: for another machine
        return f"it needs compute capability {'.'.join(map(str, CAPABILITY))}"
    return ""
