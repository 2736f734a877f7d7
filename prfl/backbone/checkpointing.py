"""Blocks that keep little for their backward pass, and compute the rest again.

``full`` keeps a block's input, one hidden state.  ``attention`` keeps the output of its self-attention as well, which
is most of the computing of a long video: selective activation checkpointing, as torch's own
(``create_selective_checkpoint_contexts``), whose storage cannot be moved to the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import prfl_kernels.attention  # noqa: F401  (it makes torch.ops.prfl.attention)
from prfl.backbone.turns import Turns
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore

Checkpointing = Literal["none", "attention", "full"]

# What attention comes to on a GPU or a CPU, and where its inputs have their tokens.  The first result is its output,
# the small ones beside it (log-sum-exp, random state) are what its backward needs.
FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default: -2,
    torch.ops.aten._scaled_dot_product_efficient_attention.default: -2,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default: -2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: -2,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default: -2,
    torch.ops.prfl.attention.default: 1,
}

Kept = Callable[[], Tensor]


@dataclass
class Running:
    """How a backbone computes.

    checkpointing: what its blocks keep for the backward pass.  block_modes, feature_modes: where they differ, of each
    block in ``velocity`` and in ``features``.  offload: what is kept waits in host memory, as the networks do while a
    video is decoded.  kernels: operations that prfl_kernels runs, as ``kernels.use_kernels`` swapped them in.
    features: the call that runs now is for hidden states.  turns: where the frozen weights of one network alone are on
    the device.
    """

    checkpointing: Checkpointing = "none"
    offload: bool = False
    block_modes: tuple[Checkpointing, ...] | None = None
    feature_modes: tuple[Checkpointing, ...] | None = None
    kernels: frozenset[str] = frozenset()
    features: bool = False
    turns: Turns | None = None

    @contextmanager
    def reading_features(self) -> Iterator[None]:
        """Around a network call whose blocks do as ``feature_modes`` say."""
        before, self.features = self.features, True
        try:
            yield
        finally:
            self.features = before

    def modes(self, count: int, *, velocity: bool) -> list[Checkpointing]:
        """What each of the first ``count`` blocks keeps."""
        chosen = ((self.block_modes if velocity else self.feature_modes) or ())[:count]
        return [*chosen, *[self.checkpointing] * (count - len(chosen))]

    def blocks_together(self, kernels: Collection[str], lean_group: int) -> int:
        """How many blocks of the network are computed again together (``Facts.kernels``, ``Facts.lean_group``)."""
        lean = self.kernels == set(kernels) and self.checkpointing == "full" and not self.offload
        return lean_group if kernels and lean else 1


def stretches(modes: Sequence[Checkpointing], group: int) -> Iterator[tuple[int, int]]:
    """First block and the one behind the last, of each stretch of blocks that is computed again by itself.

    modes: what each block keeps.  group: how many blocks stay together where all of them keep their input alone.
    """
    first = 0
    while first < len(modes):
        together = set(modes[first : first + group]) == {"full"}
        last = min(first + (group if together else 1), len(modes))
        yield first, last
        first = last


def one_after_another(
    blocks: Sequence[Callable[..., Tensor]], head: Callable[[Tensor], Tensor] | None = None
) -> Callable[..., Tensor]:
    """A function of what the first block is given: the hidden states after the last, or what ``head`` makes of them."""

    def run(hidden: Tensor, *others: Any) -> Tensor:
        for block in blocks:
            hidden = block(hidden, *others)
        return hidden if head is None else head(hidden)

    return run


def run_block(
    block: Callable[..., Any], hidden: Tensor, *others: Any, mode: Checkpointing, store: HostStore | None = None
) -> Any:
    """``block(hidden, *others)`` under checkpointing (not ``none``): hidden states, or a tuple that begins with them.

    store: where what it keeps goes to.

    Raises PrflError where ``attention`` finds no fused attention to keep.
    """
    if store is not None:
        store.new_group()
    with _inputs_to(store, hidden):
        if mode == "full":
            return checkpoint(block, hidden, *others, use_reentrant=False)
        kept: deque[tuple[Any, ...]] = deque()
        contexts = KeepAttention(kept, store), GiveAttention(kept)
        result = checkpoint(block, hidden, *others, use_reentrant=False, context_fn=lambda: contexts)
    if not kept:
        raise PrflError(
            "no fused self-attention ran in a block, so there is no output to keep",
            where="backbone.checkpointing",
            fix="use full; `prfl doctor` says which attention runs here",
        )
    return result


def _inputs_to(store: HostStore | None, hidden: Tensor) -> AbstractContextManager:
    """What checkpointing saves itself are a block's inputs.  The hidden states move; the rest all blocks share."""
    if store is None:
        return nullcontext()

    storage = hidden.untyped_storage()._cdata  # not the tensor: the graph refers to these functions

    def pack(tensor: Tensor) -> Any:
        return store.put(tensor) if tensor.untyped_storage()._cdata == storage else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else store.take(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _AttentionMode(TorchDispatchMode):
    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled blocks stay compiled: they call fused attention as an operation of its own, seen here."""
        return True

    @staticmethod
    def is_self_attention(func: Callable, args: Sequence[Any]) -> bool:
        """As many keys as queries.  Attention to the text is cheap: it is computed again."""
        dim = FUSED_ATTENTION.get(func)
        return dim is not None and args[0].shape[dim] == args[1].shape[dim]


class KeepAttention(_AttentionMode):
    """The forward pass: puts the results of self-attention by."""

    def __init__(self, kept: deque[tuple[Any, ...]], store: HostStore | None) -> None:
        super().__init__()
        self.kept, self.store = kept, store

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if self.is_self_attention(func, args):
            # Detached: autograd is about to hang its graph on the results themselves.
            output, *small = (x.detach() if isinstance(x, Tensor) else x for x in results)
            self.kept.append((_kept(output, self.store), *small))
        return results


class GiveAttention(_AttentionMode):
    """The recomputation: gives them in the place of computing them."""

    def __init__(self, kept: deque[tuple[Any, ...]]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.is_self_attention(func, args):
            return func(*args, **(kwargs or {}))
        if not self.kept:
            raise RuntimeError("a second backward pass through blocks whose attention was kept for one")
        output, *small = self.kept.popleft()
        return output(), *small


def _kept(output: Tensor, store: HostStore | None) -> Kept:
    if store is None:
        return lambda: output
    parked = store.put(output)
    return lambda: store.take(parked)
