"""What a method will cost: it is run on chains of nothing, which count as real ones do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch

from prfl.backbone.condition import Ask, Condition
from prfl.rollout.solvers import SolverSchedule
from prfl.steering.calls import Calls, Prices
from prfl.steering.chains import Steered
from prfl.steering.process import Look, Process
from prfl.utils.errors import PrflError

MOST = 512  # chains that a budget may be spent on


@runtime_checkable
class Method(Protocol):
    """A way of steering.  chains: how many of a video there are at once.  keep: videos that it gives."""

    @property
    def chains(self) -> int: ...

    @property
    def keep(self) -> int: ...

    def __call__(self, process: Process) -> Steered: ...


def calls_of(method: Method, schedule: SolverSchedule, looks: Sequence[Look], prices: Prices) -> Calls:
    """Count the network calls of one video, by running the method with a network and rewards that do nothing.

    Of methods whose costs depend on the scores (LatSearch, trees) it is the most that they may cost.
    """
    blind = [replace(look, read=lambda latents, sigma, condition: latents.flatten(1).sum(1) * 0) for look in looks]
    process = Process(
        network=lambda latents, sigma, condition: latents * 0,
        schedule=schedule,
        looks=blind,
        condition=Condition({}, (Ask(""),)),
        indices=[0],
        state=(1,),
        prices=prices,
        counting=True,
    )
    with torch.random.fork_rng(devices=[]):
        return method(process).calls


def within(budget: float, method: Any, schedule: SolverSchedule, looks: Sequence[Look], prices: Prices) -> Method:
    """The method with as many chains as ``budget`` network calls a video allow.  Raises PrflError for too few."""
    fitting = None
    for count in range(max(1, method.keep), MOST + 1):
        fewer = replace(method, chains=count)
        if calls_of(fewer, schedule, looks, prices).total > budget:
            break
        fitting = fewer
    if fitting is None:
        least = calls_of(replace(method, chains=max(1, method.keep)), schedule, looks, prices).total
        what = f"{budget:g} network calls a video are too few: one chain takes {least:.1f}"
        raise PrflError(what, where="steering.budget", fix=f"{least:.0f} or more, or fewer steps")
    return fitting
