"""Counts the bytes of the tensors that live while a piece of code runs, and of those that autograd keeps.

On ``meta`` an operation allocates nothing but says what it would: its outputs' sizes and what autograd keeps of them.
So the very code that trains is run there, rather than a formula that would have to follow every change of it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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

    On ``meta``, an operation that was run on inputs of these layouts is not worked out again: torch works most of them
    out in Python, at a tenth of a millisecond each, and the blocks of a network are alike.  Not remembered are views,
    what writes into other inputs than its first, and what reads numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return self._viewed(func, args, kwargs)
        inputs: list[Tensor] = []
        key = type(self), func, torch.get_default_dtype(), described(args, inputs), described(kwargs.items(), inputs)
        if not inputs or not all(tensor.is_meta for tensor in inputs):
            result, _ = self._run(func, args, kwargs, inputs)
            return result

        call = _CALLS.get(key)
        if call is None:
            return self._run_first(func, args, kwargs, inputs, key)
        if call.in_place:
            self.add(call.amounts)
            return args[0]
        if call.layouts is None:
            result, _ = self._run(func, args, kwargs, inputs)
            return result
        results = tuple(layout and self._new(layout) for layout in call.layouts)
        self.add(call.amounts)
        return results if call.several else results[0]

    def amounts_of(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, tensors: list[Tensor]
    ) -> Any:
        """Return what a subclass counts of an operation that is no view; by the layouts of its tensors alone.

        tensors: its inputs and results."""

    def add(self, amounts: Any) -> None:
        """Called after each operation that is no view.  amounts: what ``amounts_of`` returned of it."""

    def _viewed(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation that returns its input's memory, or now and then new one."""
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and args and isinstance(args[0], Tensor) and _key(result) == _key(args[0]):
            return result
        self._count_new(tensors_in((result,)), [*tensors_in(args), *tensors_in(tuple(kwargs.values()))])
        return result

    def _run(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Sequence[Tensor]
    ) -> tuple[Any, Any]:
        """Run an operation and count it; returns its result and its amounts."""
        result = func(*args, **kwargs)
        results = tensors_in((result,))
        self._count_new(results, inputs)
        amounts = self.amounts_of(func, args, kwargs, result, [*inputs, *results])
        self.add(amounts)
        return result, amounts

    def _run_first(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: list[Tensor], key: Hashable
    ) -> Any:
        """Run an operation on ``meta`` and remember what it did."""
        result, amounts = self._run(func, args, kwargs, inputs)
        several = len(func._schema.returns) > 1
        if not func._schema.is_mutable:
            _CALLS[key] = _Call(_layouts(result, inputs), amounts, several)
        elif args and result is args[0] and isinstance(result, Tensor) and _only_writes(func):
            again = type(self), func, torch.get_default_dtype(), described(args), described(kwargs.items())
            if again == key:  # as large as it was
                _CALLS[key] = _Call(None, amounts, several, in_place=True)
        return result

    def _new(self, layout: _Layout) -> Tensor:
        tensor = torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device="meta")
        self._count(tensor.untyped_storage(), layout.nbytes)
        return tensor

    def _count_new(self, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        before = {_key(tensor) for tensor in inputs}
        for tensor in results:
            if _key(tensor) not in before:  # a view or an in-place result is nothing new
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._storages:
            return
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
    nbytes: int


@dataclass(frozen=True)
class _Call:
    """What an operation does on ``meta`` with inputs of certain layouts.

    layouts: of its results; None: it has to be run each time.  in_place: it does nothing there but to return its first
    argument, where it is and as large as it is.  several: it returns a tuple.
    """

    layouts: list[_Layout | None] | None
    amounts: Any
    several: bool
    in_place: bool = False


_CALLS: dict[Hashable, _Call] = {}  # by who counts, an operation and the layouts of its inputs


def _only_writes(func: OpOverload) -> bool:
    """Return whether an operation that writes leaves its first argument's memory where it is."""
    return func.overloadpacket.__name__ not in ("set_", "resize_", "resize_as_")


def described(values: Iterable[Any], tensors: list[Tensor] | None = None) -> Hashable:
    """Return what the layouts of an operation's results depend on in its arguments.  tensors: gets those in them."""
    parts: list[Hashable] = []
    for value in values:
        if isinstance(value, Tensor):
            parts.append((value.shape, value.stride(), value.dtype))
            if tensors is not None:
                tensors.append(value)
        elif isinstance(value, list | tuple):
            parts.append(described(value, tensors))
        else:
            parts.append((type(value), value))  # the type, since 1, 1.0 and True are one key
    return tuple(parts)


def _layouts(result: Any, inputs: Sequence[Tensor]) -> list[_Layout | None] | None:
    """Return the layout of each result; None unless each is a plain tensor with memory of its own, or nothing."""
    results = result if isinstance(result, tuple) else (result,)
    tensors = [each for each in results if each is not None]
    if not all(type(each) is Tensor and each.is_meta and not each.is_complex() for each in tensors):
        return None
    layouts = [None if each is None else _layout(each) for each in results]
    for layout in filter(None, layouts):
        empty = torch.empty_strided(layout.size, layout.stride, dtype=layout.dtype, device="meta")
        if empty.untyped_storage().nbytes() != layout.nbytes:
            return None
    keys = [*map(_key, tensors), *{_key(tensor) for tensor in inputs}]
    return layouts if len(set(keys)) == len(keys) else None


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tensor.shape, tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes())


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
