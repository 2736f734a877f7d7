"""Network calls without gradient that cost less and are less exact: for the way of a rollout to the steps it trains.

``products: float8`` multiplies the frozen linear layers of the blocks in float8, ``attention: int8`` attends among a
video's tokens in 8 bits, and ``cache`` skips all blocks but the first where that one does almost what it did before:
the first-block cache of ParaAttention and diffusers, after TeaCache (Liu et al. 2024, arXiv 2411.19108).  Adapters,
attention to the text, embedders and the final projection are as they are.

A gradient is not concerned: what is differentiated is computed exactly, at the latents where a cheaper way has led.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prfl.backbone.attention import INT8
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.checkpointing import one_after_another
from prfl.backbone.dropout import dropouts, dropping
from prfl.backbone.eight_bits import Float8Linear
from prfl.backbone.wan.kernels import KernelSelfAttention

if TYPE_CHECKING:
    from prfl.backbone.wan.model import WanBackbone


class CheaperCalls:
    """The network calls of one rollout, under the adapter that is selected when it begins.

    exact: the nodes whose calls are computed in full; all others are as ``how`` says.
    """

    def __init__(self, backbone: WanBackbone, how: Cheaper, exact: Set[int]) -> None:
        self.backbone, self.exact = backbone, exact
        self.cache = StepCache(how.cache) if how.cache else None
        lists = [network.get_submodule("blocks") for network in backbone.computing.values()]
        blocks = [block for blocks_of_one in lists for block in blocks_of_one.children()]
        self.products, self.attentions = list[nn.Module](), list[tuple[Any, KernelSelfAttention]]()
        if how.products == "float8":  # the factors of adapters are of a class of their own (``adapters.LowRank``)
            self.products = [layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear]
        if how.attention == "int8":
            attentions = [block.attn1 for block in blocks]
            self.attentions = [(each, KernelSelfAttention(backbone.running.kernels, INT8, each)) for each in attentions]

    @contextmanager
    def at(self, node: int) -> Iterator[None]:
        """Around the network's call, or calls, at this node: without gradient."""
        assert not torch.is_grad_enabled(), "a cheaper call has no gradient"
        if self.cache is not None:
            self.cache.computes_all = node in self.exact
        self.backbone.step_cache = self.cache
        try:
            with nullcontext() if node in self.exact else self._eight_bits():
                yield
        finally:
            self.backbone.step_cache = None

    @contextmanager
    def _eight_bits(self) -> Iterator[None]:
        before = [attention.processor for attention, _ in self.attentions]
        for layer in self.products:
            layer.__class__ = Float8Linear
        for attention, processor in self.attentions:
            attention.processor = processor
        try:
            yield
        finally:
            for layer in self.products:
                layer.__class__ = nn.Linear
            for (attention, _), processor in zip(self.attentions, before, strict=True):
                attention.processor = processor

    @property
    def cached(self) -> float | None:
        """The share of evaluations, a sample and branch of guidance each, that took the cache's; None without one."""
        return None if self.cache is None else self.cache.skipped / max(1, self.cache.evaluations)


@dataclass(eq=False)
class Branch:
    """Of one condition's samples, at each one's last computed call: what the first block added to its input, and what
    the others added to that.  (b, tokens, width) each.  condition: kept, so that no other one gets its identity.
    network: that computed it, of which another can take nothing over."""

    condition: object
    network: nn.Module
    by_first: Tensor
    by_others: Tensor


@dataclass(eq=False)
class StepCache:
    """Skips all blocks but the first, sample by sample: a sample's result does not depend on the others of its batch.

    Branches of guidance are told apart by their conditions, which one rollout asks for again and again.
    """

    threshold: float
    computes_all: bool = False
    evaluations: int = 0
    skipped: int = 0
    branches: dict[int, Branch] = field(default_factory=dict)

    def run(
        self, network: nn.Module, condition: object, hidden: Tensor, text: Tensor, modulation: Tensor, rotary: Any
    ) -> Tensor:
        """The hidden states after the last block.  hidden, text, modulation: of each sample."""
        first, *others = network.get_submodule("blocks").children()
        rest = one_after_another(others)
        after_first = first(hidden, text, modulation, rotary)
        by_first = after_first - hidden
        branch = self.branches.get(id(condition))
        branch = branch if branch is not None and branch.network is network else None
        changed = self._changed(by_first, branch)
        self.evaluations += len(hidden)
        self.skipped += len(hidden) - len(changed)
        if len(changed) == len(hidden):
            result = rest(after_first, text, modulation, rotary)
            self.branches[id(condition)] = Branch(condition, network, by_first, result - after_first)
            return result
        assert branch is not None
        result = after_first + branch.by_others
        if changed:
            rows = torch.tensor(changed, device=hidden.device)
            with _dropping_rows(network, rows):
                computed = rest(after_first[rows], text[rows], modulation[rows], rotary)
            branch.by_first[rows], branch.by_others[rows] = by_first[rows], computed - after_first[rows]
            result[rows] = computed
        return result

    def _changed(self, by_first: Tensor, branch: Branch | None) -> list[int]:
        """The samples whose blocks must be run."""
        every = list(range(len(by_first)))
        if self.computes_all or branch is None or by_first.is_meta:  # whose forecast supposes that none is skipped
            return every
        change, size = (_size(by_first - branch.by_first), _size(branch.by_first))
        near = (change < self.threshold * size).tolist()
        return [row for row in every if not near[row]]


def _size(x: Tensor) -> Tensor:
    """(b,) sums of absolute values, in float32 at least without a copy of x in it."""
    return torch.linalg.vector_norm(x, 1, dim=(1, 2), dtype=torch.promote_types(x.dtype, torch.float32))


@contextmanager
def _dropping_rows(network: nn.Module, rows: Tensor) -> Iterator[None]:
    """The masks of these samples of the batch, where an adapter's inputs are being dropped."""
    layers = [layer for layer in dropouts(network) if layer.seeds is not None]
    seeds = layers[0].seeds if layers else None
    with nullcontext() if seeds is None else dropping(layers, seeds[rows]):
        yield
