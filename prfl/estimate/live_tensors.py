"""Counts the bytes of the tensors that live while a piece of code runs, and of those that autograd keeps.

On ``meta`` an operation allocates nothing but says what it would: its outputs' sizes and what autograd keeps of them.
So the very code that trains is run there, rather than a formula that would have to follow every change of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager.  ``live`` and ``peak``: bytes of the tensors made inside it, now and at most.

    Tensors that were there before (weights, inputs) are not counted.  Workspaces that an operation frees before it
    returns (cuDNN's, say) and the allocator's rounding are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:  # a view or an in-place result is nothing new
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _freed(self, key: int, size: int, _: weakref.ref) -> None:
        self.live -= size
        del self._storages[key]


@dataclass(eq=False)
class _Packed:
    tensor: Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Context manager.  ``live`` and ``peak``: bytes of the distinct storages that autograd keeps for its backward
    passes, now and at most, of the graphs that are built inside it.  ignored: tensors that are not counted."""

    def __init__(self, ignored: Sequence[Tensor] = ()) -> None:
        self.live = self.peak = 0
        self._ignored = {_key(tensor) for tensor in ignored}
        self._owners: Counter[int] = Counter()
        super().__init__(self._pack, lambda packed: packed.tensor)

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> _Packed:
        key, packed = _key(tensor), _Packed(tensor)
        size = 0 if key in self._ignored else tensor.untyped_storage().nbytes()
        self._owners[key] += 1
        if self._owners[key] == 1:
            self.live += size
            self.peak = max(self.peak, self.live)
        weakref.finalize(packed, self._drop, key, size)
        return packed

    def _drop(self, key: int, size: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def fused_on_meta(device: str) -> Iterator[None]:
    """Have ``meta`` keep, inside the context, what the fused operations of ``device`` (cpu or cuda) keep.

    ``meta`` takes scaled dot product attention apart and would count a matrix of tokens x tokens; CPU and GPU run a
    fused one, which keeps queries, keys, values, the output and one number a token.  A GPU also fuses the RMS norm,
    which then keeps its input; layer norm stands in for it, which keeps the same and one more number a token.
    torch's function modes are off while a checkpointed block is computed again, so the two functions are replaced.
    """
    attention, rms_norm = F.scaled_dot_product_attention, F.rms_norm

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        run = _fused_attention if query.is_meta else attention
        return run(query, key, value, *args, **kwargs)

    def fused_rms_norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if input.is_meta:
            return F.layer_norm(input, normalized_shape, weight)
        return rms_norm(input, normalized_shape, weight, eps)

    F.scaled_dot_product_attention = fused_attention
    if device == "cuda":
        F.rms_norm = fused_rms_norm
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, rms_norm


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
