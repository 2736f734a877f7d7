"""Dropout of an adapter's input, by masks that a seed for each sample decides.

A policy's chain is rolled out without autograd and its steps are computed again with it, as checkpointed blocks are:
both must be of one function.  So a mask is no state of a generator but a function of (the sample's seed, the layer,
token and channel), and a sample has one for all network calls of an optimizer step: it is drawn, and differentiated,
under one thinned adapter.  Layers that read the same input share its mask, as the kernels do.  So do all tokens of a
text: its padding is one token many times over (``condition.fold_padding``), whose number is the batch's.

Without seeds, outside of ``dropping``, nothing is dropped: evaluation, rewards, distances to the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prfl_kernels.lora_linear import dropped


class SampleDropout(nn.Module):
    """layer: the full name of the linear layer.  ``seeds``: (b,) of the samples whose masks are used now, or None."""

    number: Tensor

    def __init__(self, rate: float, layer: str) -> None:
        super().__init__()
        self.rate = rate
        self.seeds: Tensor | None = None
        module, _, name = layer.rpartition(".")
        self.reads_text = module.endswith("attn2") and name in ("to_k", "to_v")
        if name in ("to_k", "to_v"):  # they read what to_q reads, or the text
            name = "text" if self.reads_text else "to_q"
        number = int.from_bytes(hashlib.sha256(f"{module}.{name}".encode()).digest()[:8], "little") >> 1
        # A tensor: numbers that differ from block to block would have each block compiled by itself.
        self.register_buffer("number", torch.tensor(number), persistent=False)

    def mask_seeds(self, x: Tensor) -> Tensor | None:
        """Of this layer's masks of x (b, tokens, d) now: (b,), or one a token; None where nothing is dropped."""
        if self.seeds is None:
            return None
        seeds = self.seeds + self.number
        return seeds.repeat_interleave(x.shape[1]) if self.reads_text else seeds

    def forward(self, x: Tensor) -> Tensor:
        seeds = self.mask_seeds(x)
        return x if seeds is None else dropped(x, seeds, self.rate)


def dropouts(network: nn.Module) -> list[SampleDropout]:
    return [module for module in network.modules() if isinstance(module, SampleDropout)]


@contextmanager
def dropping(layers: list[SampleDropout], seeds: Tensor) -> Iterator[None]:
    """Use the masks of these seeds, (b,), in forward *and* backward."""
    before = [layer.seeds for layer in layers]
    for layer in layers:
        layer.seeds = seeds
    try:
        yield
    finally:
        for layer, seeds_before in zip(layers, before, strict=True):
            layer.seeds = seeds_before
