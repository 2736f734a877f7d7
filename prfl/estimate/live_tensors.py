"""Counts the bytes of the tensors that live while a piece of code runs, and of those that autograd keeps.

On ``meta`` an operation allocates nothing but says what it would: its outputs' sizes and what autograd keeps of them.
So the very code that trains is run there, rather than a formula that would have to follow every change of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


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
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = tensors_in(args)
        if kwargs:
            inputs += tensors_in(tuple(kwargs.values()))
        before = {_key(tensor) for tensor in inputs}
        result = _run(func, args, kwargs or {}, inputs)
        results = tensors_in((result,))
        for tensor in results:
            if _key(tensor) not in before:  # a view or an in-place result is nothing new
                self._count(tensor)
        self.saw(func, args, kwargs or {}, result, inputs + results)
        return result

    def saw(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, tensors: list[Tensor]
    ) -> None:
        """Called after each operation.  tensors: its inputs and results."""

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


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results, those in its lists too."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += tensors_in(value)
    return tensors


@dataclass(frozen=True)
class _Layout:
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")


# By an operation and the layouts of its inputs: those of its results on ``meta``.  None: it has to be run each time.
_RESULTS: dict[Hashable, list[_Layout | None] | None] = {}
# By the same those that write into their first argument, return it, and leave it where it is and as large as it is.
_IN_PLACE: set[Hashable] = set()
_OTHER_STORAGE = ("set_", "resize_", "resize_as_")


def _run(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]) -> Any:
    """Run an operation; on ``meta``, one that was run on inputs of these layouts is not worked out again.

    torch works most of them out in Python, at a tenth of a millisecond each, and the blocks of a network are alike.
    Not remembered are views, what writes into other inputs than its first, and what reads numbers.
    """
    if not inputs or func.is_view or not all(tensor.is_meta for tensor in inputs):
        return func(*args, **kwargs)

    key = _call_key(func, args, kwargs)
    if func._schema.is_mutable:
        return _written(func, args, kwargs, key)

    layouts = _RESULTS.get(key)
    if layouts is None:
        result = func(*args, **kwargs)
        if key not in _RESULTS:
            _RESULTS[key] = _layouts(result, inputs)
        return result

    results = tuple(layout and layout.empty() for layout in layouts)
    return results if len(func._schema.returns) > 1 else results[0]


def _written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], key: Hashable) -> Any:
    """Run an operation that writes, unless it was seen to do nothing on ``meta`` but to return its first argument."""
    if key in _IN_PLACE:
        return args[0]
    result = func(*args, **kwargs)
    if args and result is args[0] and isinstance(result, Tensor) and func.overloadpacket.__name__ not in _OTHER_STORAGE:
        if _call_key(func, args, kwargs) == key:  # as large as it was
            _IN_PLACE.add(key)
    return result


def _call_key(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What the layouts of an operation's results depend on."""
    return func, torch.get_default_dtype(), _described(args), _described(tuple(kwargs.items()))


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value  # the type, since 1, 1.0 and True are one key


def _layouts(result: Any, inputs: Sequence[Tensor]) -> list[_Layout | None] | None:
    """Return the layout of each result; None unless each is a plain tensor with memory of its own, or nothing."""
    results = result if isinstance(result, tuple) else (result,)
    tensors = [each for each in results if each is not None]
    if not all(type(each) is Tensor and each.is_meta and not each.is_complex() for each in tensors):
        return None
    layouts = [None if each is None else _Layout(each.shape, each.stride(), each.dtype) for each in results]
    for tensor, layout in zip(tensors, filter(None, layouts), strict=True):
        if layout.empty().untyped_storage().nbytes() != tensor.untyped_storage().nbytes():
            return None
    keys = [*map(_key, tensors), *{_key(tensor) for tensor in inputs}]
    return layouts if len(set(keys)) == len(keys) else None


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
