"""What a family may offer beyond the protocol: operations of prfl_kernels, and rollouts whose calls cost less."""

from __future__ import annotations

from collections.abc import Collection, Set
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from prfl.backbone.attention import DIFFUSERS
from prfl.backbone.base import Backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.network import all_predictors
from prfl.utils.errors import PrflError


@runtime_checkable
class TakesKernels(Protocol):
    def use_kernels(self, which: Collection[str], attention: str) -> None:
        """Swap these operations in, all others out, and an attention."""


@runtime_checkable
class CheaperCalls(Protocol):
    """The network calls of one rollout, under the adapter that is selected when it begins."""

    @property
    def cached(self) -> float | None:
        """The share of evaluations, a sample and branch of guidance each, that took the cache's; None without one."""

    def at(self, node: int) -> AbstractContextManager:
        """Around the network's call, or calls, at this node: without gradient."""


@runtime_checkable
class CallsCheaper(Protocol):
    def cheaper(self, how: Cheaper, exact: Set[int]) -> CheaperCalls:
        """The calls of one rollout that cost less but at the nodes ``exact``."""


def use_kernels(backbone: Backbone, which: Collection[str], attention: str = "sdpa") -> None:
    """Run these operations by prfl_kernels, the others as diffusers does, and one of ``attention.NAMES``.

    Raises PrflError for operations that the family has none for.
    """
    if isinstance(backbone, TakesKernels):
        backbone.use_kernels(which, attention)
        return
    if which or attention not in DIFFUSERS or attention not in backbone.facts.attention:
        raise PrflError(
            f"prfl_kernels has nothing for a {backbone.facts.family} model",
            where="backbone.kernels",
            fix="kernels: torch, and attention: sdpa",
        )
    if len(backbone.facts.attention) > 1:  # else it is always the same
        for network in all_predictors(backbone):
            network.set_attention_backend(DIFFUSERS[attention])


def cheaper_calls(backbone: Backbone, how: Cheaper, exact: Set[int] = frozenset()) -> CheaperCalls:
    """The calls of one rollout that cost less but at the nodes ``exact``.  Raises PrflError where a family has none."""
    if isinstance(backbone, CallsCheaper):
        return backbone.cheaper(how, exact)
    what = f"a {backbone.facts.family} model has no cheaper calls"
    raise PrflError(what, where="rollout.cheaper", fix="leave rollout.cheaper out")
