"""Measure how long each part of a step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sums wall time by name: ``with clock("rollout"): ...``; waits for a GPU before it reads the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def metrics(self) -> dict[str, float]:
        return {f"seconds/{name}": value for name, value in self.seconds.items()}
