"""The sampling chain without autograd: only latents are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.errors import PrflError
from prfl.offload import HostStore, Parked
from prfl.solvers import Coefficients, combine

# (latents (batch, ...), sigma ()) -> output (batch, ...).  Condition and guidance are closed over.
Network = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a rollout leaves: ``latents[i]`` is x[i] for i = 0 .. N, here or in ``store``; None where none was kept."""

    latents: list[Tensor | Parked | None]
    coefficients: Coefficients
    noises: Sequence[Tensor] | Mapping[int, Tensor] | None = None
    store: HostStore | None = None

    def at(self, node: int) -> Tensor:
        """x[node]; it must have been kept."""
        latents = self.latents[node]
        assert latents is not None, f"the rollout did not keep the latents of node {node}"
        if isinstance(latents, Tensor):
            return latents
        assert self.store is not None
        return self.store.take(latents)


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
    noises: Sequence[Tensor] | Mapping[int, Tensor] | None = None,
    keep: Literal["all"] | Set[int] = "all",
    store: HostStore | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Trajectory:
    """x[i+1] = a[i] x[i] + sum b[i][k] f[k] + c[i] noise[i] from ``start`` = x[first] to x[last], default N.

    keep: which nodes stay, "all" or a set; x[last] always does.  store: where kept latents wait, all but x[last], which
    is wanted first; default is where they are made.  noises: standard normal, by step, needed where c[i] is not 0.
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
        still_needed = set().union(*coefficients.b[i + 1 : last])
        outputs = {k: output for k, output in outputs.items() if k in still_needed}
        if on_step is not None:
            on_step(i, x)
    if store is not None:
        store.settle()
    latents[last] = x
    return Trajectory(latents, coefficients, noises, store)


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
