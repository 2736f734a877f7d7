"""The work of a piece of code, by counting: arithmetic, memory traffic and launches of each kind of operation.

An operation that is not a view counts its operands and results as traffic, and as one launch; products and convolutions
count their arithmetic.  So it is what eager torch asks of a GPU, before caches; nothing is timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from prfl.estimate.live_tensors import LiveBytes

PRODUCT, REST = "matrix products", "norms, gates, rotations, copies"
CONVOLUTION = "convolutions of the VAE, in float32"
FORWARD, BACKWARD = "attention, forward", "attention, backward"
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
CONVOLUTIONS = ("convolution", "convolution_backward")
# Matrix products of tokens x keys x channels in each: a backward pass rebuilds the weights first.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
    "attention": 2,
    "attention_query_gradient": 3,
    "attention_key_gradient": 4,
}
FORWARDS = ("_scaled_dot_product_flash_attention_for_cpu", "attention")


@dataclass(frozen=True)
class Work:
    """amounts: {(kind, unit): amount}, in GFLOP, GB and launches."""

    amounts: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        keys = {**self.amounts, **other.amounts}
        return Work({key: self.amounts.get(key, 0.0) + other.amounts.get(key, 0.0) for key in keys})

    def __mul__(self, factor: float) -> Work:
        return Work({key: factor * amount for key, amount in self.amounts.items()})

    @property
    def kinds(self) -> list[str]:
        return sorted({kind for kind, _ in self.amounts})


class Counted(LiveBytes):
    """Context manager.  Counts the bytes of tensors, as ``LiveBytes``, and the work."""

    def __init__(self) -> None:
        super().__init__()
        self.amounts: defaultdict[tuple[str, str], float] = defaultdict(float)

    @property
    def work(self) -> Work:
        return Work(dict(self.amounts))

    def amounts_of(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, tensors: list[Tensor]
    ) -> tuple[str, float, float] | None:
        """Return an operation's kind, GFLOP and GB; None of one that only makes or detaches a tensor."""
        name = func.overloadpacket.__name__
        if not tensors or name in ("detach", "empty", "empty_like", "new_empty"):
            return None
        kind, flops = arithmetic(func, name, args, kwargs, result)
        return kind, flops / 1e9, sum(leaf.numel() * leaf.itemsize for leaf in tensors) / 1e9

    def add(self, amounts: tuple[str, float, float] | None) -> None:
        if amounts is None:
            return
        kind, gflop, gb = amounts
        self.amounts[kind, "GFLOP"] += gflop
        self.amounts[kind, "GB"] += gb
        self.amounts[kind, "launches"] += 1


def arithmetic(
    operation: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> tuple[str, float]:
    """Return the kind of an operation, and how many floating point operations it is."""
    if name in PRODUCTS:
        factors = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
        return PRODUCT, 2 * factors[0].numel() * factors[1].shape[-1]
    if name in ATTENTION:
        forward = name in FORWARDS
        query, key = args[:2] if forward else args[1:3]  # a backward pass begins with the output's gradient
        tokens = -2 if name.startswith("_scaled") else 1
        return FORWARD if forward else BACKWARD, ATTENTION[name] * 2 * query.numel() * key.shape[tokens]
    if name in CONVOLUTIONS and args[0].dtype == torch.float32:
        return CONVOLUTION, flop_registry[operation.overloadpacket](*args, **kwargs, out_val=result)
    return REST, 0.0


# Of an H200 in a second: what public measurements reach of each kind (matrix products, cuDNN's attention, copies), and
# float32 by its data sheet.
H200_GFLOPS = {PRODUCT: 680e3, FORWARD: 600e3, BACKWARD: 516e3, REST: 680e3, CONVOLUTION: 67e3}
H200_GBS = 4200.0


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet.  tensor: TFLOPS of bfloat16 with float32 sums, dense.  single: of float32.  bandwidth:
    GB/s."""

    name: str
    tensor: float
    single: float
    bandwidth: float

    def seconds(self, work: Work, in_float32: bool = False) -> float:
        """Return the seconds of this work where the card reaches of its data sheet what an H200 does.

        Each kind takes the larger of its arithmetic and its traffic.  in_float32: of matrix products and attention too.
        """
        gbs = H200_GBS * self.bandwidth / H200.bandwidth
        total = 0.0
        for kind in work.kinds:
            share = self.single / H200.single
            rate = H200_GFLOPS[kind] * self.tensor / H200.tensor
            if in_float32 or kind == CONVOLUTION:
                rate = H200_GFLOPS[CONVOLUTION] * share
            total += max(work.amounts[kind, "GFLOP"] / rate, work.amounts[kind, "GB"] / gbs)
        return total


H200 = Card("H200", tensor=989.0, single=67.0, bandwidth=4800.0)
SLOWER = 2.0  # than the rates above at the slow end of a range: nothing has been timed on a GPU


@dataclass(frozen=True)
class CardSize:
    """Cards that are sold with this much memory.  gib: what torch sees of it.  slow, fast: the ends of a range."""

    gigabytes: int
    gib: float
    slow: Card
    fast: Card

    @property
    def names(self) -> str:
        return self.fast.name if self.slow is self.fast else f"{self.slow.name} to {self.fast.name}"

    def hours(self, work: Work, in_float32: bool = False) -> tuple[float, float]:
        """Return the least hours, of the fast card, and the most, of the slow one at half the rates."""
        fast, slow = (card.seconds(work, in_float32) / 3600 for card in (self.fast, self.slow))
        return fast, SLOWER * slow


CARD_SIZES = {
    24: CardSize(24, 23.5, Card("RTX 3090", 71.0, 35.6, 936.0), Card("RTX 4090", 165.0, 82.6, 1008.0)),
    48: CardSize(48, 47.4, Card("RTX A6000", 155.0, 38.7, 768.0), Card("RTX 6000 Ada", 364.0, 91.1, 960.0)),
    80: CardSize(80, 79.1, Card("A100", 312.0, 19.5, 2039.0), Card("H100", 989.0, 67.0, 3350.0)),
    141: CardSize(141, 139.8, H200, H200),
}
