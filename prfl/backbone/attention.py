"""Which attention runs: an explicit choice, else the variable PRFL_ATTENTION, else automatic.

All but ours are asked for through diffusers' own dispatcher.  A choice is tried before it is believed, on a few tokens
of the run's type and head size, forward and backward, beside plain softmax; one that cannot run is an error.  It is of
the attention among a video's tokens: ``for_text`` says which runs beside it for the few keys of the text.
"""

from __future__ import annotations

import importlib
import os

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from prfl.backbone.eight_bits import int8_attention
from prfl_kernels.attention import attention
from prfl_kernels.dispatch import Choice, interpreting

VARIABLE = "PRFL_ATTENTION"
DIFFUSERS = {  # its name for each
    "sdpa": "native",
    "cudnn": "_native_cudnn",
    "flash": "_native_flash",  # FlashAttention 2, which torch brings
    "flash_3": "_native_flash",
    "flash_4": "_native_flash",
    "xformers": "xformers",
}
NAMES = (*DIFFUSERS, "triton")
INT8 = "int8"  # without gradient, for rollouts alone: not among the names
PACKAGES = {"xformers": "xformers.ops"}
INSTALLED_BY = {
    "flash_3": "build it from the folder hopper of github.com/Dao-AILab/flash-attention",
    "flash_4": "pip install flash-attn-4",
    "xformers": "pip install xformers",
    INT8: "pip install sageattention",
}
ON_GPUS = ("cudnn", "flash_3", "flash_4")
ACTIVATED = {"flash_3": "FA3", "flash_4": "FA4"}  # packages that torch's flash attention then calls
# By the major number of a GPU's compute capability: those whose authors measure them to be faster than cuDNN there, the
# most proven first.
FASTEST = {9: ("flash_3", "flash_4"), 10: ("flash_4",)}
TRIED = 48  # tokens
TOLERANCE = 16  # roundings of the type, of values of about one
INT8_LIMIT = 0.1  # for the same values: the simulated rounding is 0.03 off


def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v.  query, key, value: (B, T, H, C).  bias: (B, 1, 1, keys).  As query."""
    if backend == INT8:
        return int8_attention(query, key, value)
    if backend == "triton":
        return attention(query, key, value, None if bias is None else bias[:, 0, 0].float())
    return dispatch_attention_fn(query, key, value, attn_mask=bias, backend=DIFFUSERS[backend])


def for_text(backend: str) -> str:
    """Which runs for the text's keys: they carry a bias (``fold_padding``), which FlashAttention does not take and
    others want in a layout of their own, and are too few to gain by it."""
    return backend if backend == "triton" else "sdpa"


def activate(backend: str) -> None:
    """Let torch's flash attention be FlashAttention 3 or 4, or its own again: one for the whole process."""
    _set_flash(ACTIVATED.get(backend))


def _set_flash(implementation: str | None) -> None:
    if implementation == current_flash_attention_impl():
        return
    if implementation is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(implementation)


def choose_attention(request: str, device: torch.device | str, dtype: torch.dtype, head_size: int) -> Choice:
    """request: ``auto``, which leaves it to PRFL_ATTENTION and then to ``automatic``, or one of them by name.

    Raises ValueError for an unknown name, and for a choice that does not run here, with the reason.
    """
    source = "chosen explicitly"
    if request == "auto":
        request, source = os.environ.get(VARIABLE) or "auto", f"chosen by {VARIABLE}"
    if request == "auto":
        return automatic(torch.device(device), dtype, head_size)
    if request not in NAMES:
        raise ValueError(f"{source}: '{request}' is none of {', '.join(NAMES)}")
    if obstacle := why_not(request, torch.device(device), dtype, head_size):
        raise ValueError(f"attention by {request}, {source}, cannot run here: {obstacle}")
    return Choice(request, source)


def automatic(device: torch.device, dtype: torch.dtype, head_size: int) -> Choice:
    """FlashAttention 3, else 4, on Hopper and 4 on Blackwell where they are installed and run, else torch's own, which
    picks cuDNN or flash attention by shape, type and GPU.  By their authors' figures; ours has not been timed yet."""
    if device.type != "cuda" or dtype == torch.float32:
        return Choice("sdpa", "automatic: torch picks among its fused kernels")
    faster = FASTEST.get(torch.cuda.get_device_capability(device)[0], ())
    if not faster:
        return Choice(
            "sdpa", "automatic: torch picks among its fused kernels, and none is known to be faster on this GPU"
        )
    obstacles = []
    for each in faster:
        if not (obstacle := why_not(each, device, dtype, head_size)):
            return Choice(each, "automatic: it is installed, and the fastest known on this GPU; the text's by sdpa")
        obstacles.append(f"{each} does not run here: {obstacle}")
    return Choice("sdpa", f"automatic: torch picks among its fused kernels; {'; '.join(obstacles)}")


def why_not(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why an attention does not run on this device, in this type, with heads of this size; empty where it does."""
    elsewhere = f"it needs a GPU, and this runs on {device.type}" if device.type != "cuda" else ""
    if backend == "triton" and elsewhere and not interpreting():
        return elsewhere
    package = "sageattention" if backend == INT8 and device.type == "cuda" else PACKAGES.get(backend)
    if package:
        try:
            importlib.import_module(package)
        except Exception as error:  # a binary for another torch raises whatever it likes
            return _in_words(error, backend)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 1, TRIED, 2, head_size, generator=generator, device="cpu").to(device, dtype)
    results, expected = (_tried(each, numbers) for each in (backend, "softmax"))
    if isinstance(results, str) or isinstance(expected, str):
        reason = results if isinstance(results, str) else str(expected)
        return elsewhere if elsewhere and backend in ON_GPUS else reason
    off = max((ours - plain).abs().max().item() for ours, plain in zip(results, expected[: len(results)], strict=True))
    limit = INT8_LIMIT if backend == INT8 else TOLERANCE * torch.finfo(dtype).eps
    return "" if off <= limit else f"it is {off:.2g} off plain softmax, more than {limit:.2g}"


def _tried(backend: str, numbers: Tensor) -> list[Tensor] | str:
    """Output and gradients (int8 has none) in float64, or why they are not there.

    What is active stays so: a run may have chosen it.
    """
    before = current_flash_attention_impl()
    wide = numbers.double() if backend == "softmax" else numbers
    query, key, value = (each.clone().requires_grad_() for each in wide[:3])
    try:
        activate(backend)
        with torch.enable_grad():
            if backend == "softmax":
                scores = torch.einsum("bthc,bshc->bhts", query, key) * query.shape[-1] ** -0.5
                result = torch.einsum("bhts,bshc->bthc", scores.softmax(-1), value)
            else:
                result = attend(backend, query, key, value)
            inputs = [query, key, value]
            gradients = () if backend == INT8 else torch.autograd.grad(result, inputs, wide[3])
    except Exception as error:  # whatever a package raises for a shape, a type or a device that it does not take
        return _in_words(error, backend)
    finally:
        _set_flash(before)
    return [each.detach().double() for each in (result, *gradients)]


def _in_words(error: Exception, backend: str) -> str:
    """What to install where a package is missing, else the first line of what it raises."""
    if isinstance(error, ModuleNotFoundError) and backend in INSTALLED_BY:
        return f"not installed: {INSTALLED_BY[backend]}"
    return next(iter(str(error).splitlines()), "") or type(error).__name__
