"""The sampling chain without autograd: only latents are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from prfl.rollout.plan import Evaluated, Node, Renoised
from prfl.rollout.solvers import SolverSchedule, combine, leap
from prfl.utils.errors import PrflError
from prfl.utils.host_store import HostStore, Parked

# (latents (batch, ...), sigma ()) -> output (batch, ...).  Condition and guidance are closed over.
Network = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class Noises(Protocol):
    """The noise of each stochastic step: a list, a mapping, or ``draws.ChainNoises``, which stores nothing."""

    def __getitem__(self, step: int, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The result of a rollout: ``latents[i]`` is x[i] for i = 0 .. N, here or in ``store``; None if it was not kept.

    outputs: f[k] for the nodes in ``keep_outputs``; an edge that reads earlier outputs needs no network call for them.
    renoised: x[N] noised again, for the nodes beside the chain.
    cached: the share of the rollout's evaluations that a step cache skipped; None without one.
    """

    latents: list[Tensor | Parked | None]
    schedule: SolverSchedule
    noises: Noises | None = None
    store: HostStore | None = None
    outputs: Mapping[Evaluated, Tensor] = field(default_factory=dict)
    renoised: Mapping[Renoised, Tensor] = field(default_factory=dict)
    cached: float | None = None

    def has(self, node: Node) -> TypeGuard[int]:
        """Return whether the rollout kept x[node]."""
        return isinstance(node, int) and self.latents[node] is not None

    def at(self, node: Evaluated) -> Tensor:
        """Return x[node]; it must have been kept."""
        latents = self.renoised[node] if isinstance(node, Renoised) else self.latents[node]
        assert latents is not None, f"the rollout did not keep the latents of node {node}"
        if isinstance(latents, Tensor):
            return latents
        assert self.store is not None
        return self.store.take(latents)

    def sigma(self, node: Evaluated, like: Tensor) -> Float[Tensor, ""]:
        """Return the noise level of x[node], as ``sigma_at`` gives it."""
        return sigma_at(self.schedule, node.i if isinstance(node, Renoised) else node, like)


def sigma_at(schedule: SolverSchedule, node: int, like: Tensor) -> Float[Tensor, ""]:
    """Return sigma[node] for the network, on the latents' device, in float32 or wider: bfloat16 would be 0.4 % off."""
    return schedule.sigmas[node].to(like.device, torch.promote_types(like.dtype, torch.float32))


@torch.no_grad()
def rollout(
    network: Network,
    start: Float[Tensor, "*shape"],
    schedule: SolverSchedule,
    *,
    first: int = 0,
    last: int | None = None,
    visits: Collection[int] | None = None,
    noises: Noises | None = None,
    keep: Literal["all"] | Set[Node] = "all",
    keep_outputs: Set[Evaluated] = frozenset(),
    store: HostStore | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    at: Callable[[int], AbstractContextManager] | None = None,
) -> Trajectory:
    """Roll out x[i+1] = a[i] x[i] + sum b[i][k] f[k] + c[i] noise[i] from ``start`` = x[first] to x[last], default N.

    visits: the nodes between them that the chain visits, default all.  It leaps over the others, in one deterministic
    step with the last visited node's output (``solvers.leap``).  Steps between neighbours are the solver's own.
    keep: the nodes whose latents are kept, "all" or a set; x[last] always is.  keep_outputs: the k whose f[k] are kept.
    store: where kept latents wait, except x[last], which is needed first; by default they stay where they are made.
    noises: standard normal noise for each step, needed where c[i] is not 0.
    on_step(i, x): called after each step from node i.  at(i): a context in which the network is called at node i.
    Raises PrflError if a step needs a noise that is missing, or an output from before ``first``, and for a leap with a
    solver that is stochastic or multistep.
    """
    last = schedule.steps if last is None else last
    _check_span(schedule, first, last, noises is not None)
    path = [i for i in range(first, last + 1) if visits is None or i in visits or i in (first, last)]
    _check_leaps(schedule, path)

    latents: list[Tensor | Parked | None] = [None] * (schedule.steps + 1)
    outputs: dict[int, Tensor] = {}
    x = start.detach()
    for i, after in pairwise(path):
        if keep == "all" or i in keep:
            latents[i] = x if store is None else parked(x, store)
        with nullcontext() if at is None else at(i):
            outputs[i] = network(x, sigma_at(schedule, i, x))

        # A leap over nodes that nobody needs, or the solver's own step.
        if after > i + 1:
            a, b = leap(schedule, i, float(schedule.sigmas[after]))
            x = combine(x, a, {i: b}, outputs)
        else:
            noise = noises[i].to(x.device) if noises is not None and schedule.c[i] else None
            x = combine(x, schedule.a[i], schedule.b[i], outputs, schedule.c[i], noise)

        # Free the outputs that no later step reads.
        still_needed = set(keep_outputs).union(*schedule.b[i + 1 : last])
        outputs = {k: output for k, output in outputs.items() if k in still_needed}
        if on_step is not None:
            on_step(i, x)

    if store is not None:
        store.settle()
    latents[last] = x
    return Trajectory(latents, schedule, noises, store, {k: output for k, output in outputs.items()})


def parked(x: Tensor, store: HostStore) -> Parked:
    store.new_group()  # one group for each: the adjoint takes them one after another
    return store.put(x)


def _check_leaps(schedule: SolverSchedule, path: list[int]) -> None:
    for i, after in pairwise(path):
        if after > i + 1 and (any(schedule.c) or any(set(b) != {k} for k, b in enumerate(schedule.b))):
            raise PrflError(
                f"a leap from node {i} to {after} of a chain whose solver is stochastic or multistep",
                where="rollout.stride",
                fix="leave it at 1, or use a deterministic one-step solver (euler)",
            )


def _check_span(schedule: SolverSchedule, first: int, last: int, has_noises: bool) -> None:
    assert 0 <= first <= last <= schedule.steps, f"steps {first} to {last} of a chain of {schedule.steps}"
    for i in range(first, last):
        if schedule.c[i] and not has_noises:
            raise PrflError(f"step {i} of the solver is stochastic, but there is no noise for it", fix="give `noises`")
        if min(schedule.b[i]) < first:
            raise PrflError(
                f"step {i} of a multistep solver needs network output {min(schedule.b[i])}, from before the start",
                fix="start at node 0, or use a one-step solver",
            )
