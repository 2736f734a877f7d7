"""The benchmarks of one pytest run: its cases, what was selected of them, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench.harness.measure import Found, measure
from bench.harness.problem import Case, Problem, Unavailable
from bench.harness.results import Row, figures

Measurements = tuple[Problem, dict[str, Found | Exception]]


class Recorded:
    """A timer for pytest-benchmark that says the recorded times: it is asked before and after each round."""

    __name__ = "recorded"

    def __init__(self, seconds: Iterable[float]) -> None:
        self._readings: Iterator[float] = chain.from_iterable((0.0, each) for each in seconds)

    def __call__(self) -> float:
        return next(self._readings)


@dataclass
class Measured:
    """One provider's figures, on their way into pytest-benchmark, or why there are none."""

    seconds: list[float]
    info: dict[str, Any]
    group: str
    failure: Exception | None = None
    timer: Recorded = field(init=False)

    def __post_init__(self) -> None:
        self.timer = Recorded(self.seconds)

    def into(self, benchmark: Any) -> None:
        """Hand rounds and figures to the ``benchmark`` fixture.

        Raises the provider's own failure, and RuntimeError where ``benchmark`` was set up before ``measured``, and so
        has another timer.
        """
        if self.failure:
            raise self.failure
        benchmark.extra_info.update(self.info)
        benchmark.pedantic(lambda: None, rounds=len(self.seconds))
        if benchmark.enabled and benchmark.stats.stats.data != self.seconds:
            raise RuntimeError("put the fixture 'measured' before 'benchmark' in the test's arguments")


class Session:
    """world: one of the plugin's, or None for the machine's.  seconds, least: of rounds, as in ``measure``."""

    def __init__(self, world: str | None, seconds: float, least: int) -> None:
        self.world = world or ("small" if torch.cuda.is_available() else "tiny")  # Wan's take hours
        self._limits = seconds, least
        self._cases: dict[str, Case] = {}
        self._wanted: dict[str, list[str]] = {}
        self._measured: dict[str, Measurements | Exception] = {}
        self.rows: list[Row] = []

    def add(self, find: Callable[[str], Iterable[Case]]) -> list[tuple[str, str]]:
        """Add the cases, and return the (case, provider) names of those that ``find`` has for this world."""
        named = []
        for case in find(self.world):
            self._cases[case.name] = case
            named += [(case.name, provider) for provider in case.providers]
        return named

    def select(self, named: Iterable[tuple[str, str]]) -> None:
        for case, provider in named:
            self._wanted.setdefault(case, []).append(provider)

    def measured(self, name: str, provider: str) -> Measured:
        """Measure all selected providers of the case, the first time.  Raises Unavailable.

        A case that fails as a whole is not tried again for its next provider.
        """
        if name not in self._measured:
            try:
                self._measured[name] = measure(self._cases[name], self._wanted[name], *self._limits)
            except Exception as reason:
                self._measured[name] = reason

        outcome = self._measured[name]
        if isinstance(outcome, Unavailable):
            raise outcome
        if isinstance(outcome, Exception):
            return Measured([], {}, name, outcome)

        problem, results = outcome
        figures_of, reference = results[provider], results[problem.reference]
        if isinstance(figures_of, Unavailable):
            raise figures_of
        if isinstance(figures_of, Exception):
            return Measured([], {}, name, figures_of)

        assert isinstance(reference, Found)
        info = figures(self._cases[name], provider, problem, figures_of, reference)
        self.rows.append(Row(f"{name}-{provider}", info, Path()))
        return Measured(figures_of.seconds, info, name)

    def done(self, name: str, provider: str) -> None:
        """Let the case's inputs go when its last provider was asked for."""
        self._wanted[name].remove(provider)
        if not self._wanted[name]:
            del self._measured[name]

    def show(self, write: Callable[[str], None], width: int) -> None:
        """Write the figures as tables, line by line."""
        from bench.harness.report import terminal

        for line in terminal(self.rows, max(width, 100)).splitlines():
            write(line)
