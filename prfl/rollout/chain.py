"""The sampling chain without autograd: only latents are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.errors import PrflError
from prfl.offload import HostStore, Parked
from prfl.solvers import Coefficients, combine

# (latents (batch, ...), sigma ()) -> output (batch, ...).  Condition and guidance are closed over.
Network = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Noises(Protocol):
    """The noise of each stochastic step: a list, a mapping, or ``draws.ChainNoises``, which stores nothing."""

    def __getitem__(self, step: int, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a rollout leaves: ``latents[i]`` is x[i] for i = 0 .. N, here or in ``store``; None where it was not kept.

    outputs: f[k] where it was asked for, which spares an edge with earlier outputs their network calls.
    beside: latents off the chain, by a number above 2 N: the chain's node whose sigma they have, and the latents.
    """

    latents: list[Tensor | Parked | None]
    coefficients: Coefficients
    noises: Noises | None = None
    store: HostStore | None = None
    outputs: Mapping[int, Tensor] = field(default_factory=dict)
    beside: Mapping[int, tuple[int, Tensor]] = field(default_factory=dict)

    def at(self, node: int) -> Tensor:
        """x[node]; it must have been kept."""
        latents = self.beside[node][1] if node in self.beside else self.latents[node]
        assert latents is not None, f"the rollout did not keep the latents of node {node}"
        if isinstance(latents, Tensor):
            return latents
        assert self.store is not None
        return self.store.take(latents)

    def sigma(self, node: int, like: Tensor) -> Float[Tensor, ""]:
        """The noise level of x[node], as ``sigma_at`` gives it."""
        return sigma_at(self.coefficients, self.beside[node][0] if node in self.beside else node, like)


def sigma_at(coefficients: Coefficients, node: int, like: Tensor) -> Float[Tensor, ""]:
    """sigma[node] as the network gets it: on the latents' device, at least float32 (a bfloat16 sigma is 0.4 % off)."""
    return coefficients.sigmas[node].to(like.device, torch.promote_types(like.dtype, torch.float32))


@torch.no_grad()
def rollout(
    network: Network,
    start: Float[Tensor, "*shape"],
    coefficients: Coefficients,
    *,
    first: int = 0,
    last: int | None = None,
    noises: Noises | None = None,
    keep: Literal["all"] | Set[int] = "all",
    keep_outputs: Set[int] = frozenset(),
    store: HostStore | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Trajectory:
    """x[i+1] = a[i] x[i] + sum b[i][k] f[k] + c[i] noise[i] from ``start`` = x[first] to x[last], default N.

    keep: which nodes stay, "all" or a set; x[last] always does.  keep_outputs: which f[k] stay.
    store: where kept latents wait, all but x[last], which is wanted first; default is where they are made.
    noises: standard normal, by step, needed where c[i] is not 0.
    on_step(i, x[i+1]) is called after each step.
    Raises PrflError when a step needs a noise, or an output from before ``first``, that is not there.
    """
    last = coefficients.steps if last is None else last
    _check_span(coefficients, first, last, noises is not None)
    latents: list[Tensor | Parked | None] = [None] * (coefficients.steps + 1)
    outputs: dict[int, Tensor] = {}
    x = start.detach()
    for i in range(first, last):
        if keep == "all" or i in keep:
            latents[i] = x if store is None else parked(x, store)
        outputs[i] = network(x, sigma_at(coefficients, i, x))
        noise = noises[i].to(x.device) if noises is not None and coefficients.c[i] else None
        x = combine(x, coefficients.a[i], coefficients.b[i], outputs, coefficients.c[i], noise)
        still_needed = set(keep_outputs).union(*coefficients.b[i + 1 : last])
        outputs = {k: output for k, output in outputs.items() if k in still_needed}
        if on_step is not None:
            on_step(i, x)
    if store is not None:
        store.settle()
    latents[last] = x
    return Trajectory(latents, coefficients, noises, store, outputs)


def parked(x: Tensor, store: HostStore) -> Parked:
    store.new_group()  # of its own: a walk takes one after another
    return store.put(x)


def _check_span(coefficients: Coefficients, first: int, last: int, has_noises: bool) -> None:
    assert 0 <= first <= last <= coefficients.steps, f"steps {first} to {last} of a chain of {coefficients.steps}"
    for i in range(first, last):
        if coefficients.c[i] and not has_noises:
            raise PrflError(f"step {i} of the solver is stochastic, but there is no noise for it", fix="give `noises`")
        if min(coefficients.b[i]) < first:
            raise PrflError(
                f"step {i} of a multistep solver needs network output {min(coefficients.b[i])}, from before the start",
                fix="start at node 0, or use a one-step solver",
            )
