"""What a benchmark declares: a case by name and settings, and the problem that is built from it in every process.

A case is a line in a list; its function builds the inputs and says how each provider works on them:

    def copying(width: int) -> Problem:
        x = torch.randn(width, width)
        return Problem({"torch": lambda: Work(lambda _: {"y": x.clone()})}, reference="torch", dtype=x.dtype)

    Case("copying", copying, {"width": 64}, providers=("torch",))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]


class Unavailable(Exception):
    """Why a case or a provider cannot run here; it is skipped with this reason."""


class Work(NamedTuple):
    """One provider, ready to be timed."""

    run: Callable[[Any], Outputs | None]  # timed; its outputs are compared, None (a ceiling's) is not
    before: Callable[[], Any] = lambda: None  # before each run, not timed; its result is given to run
    constant: Sequence[Tensor] = ()  # weights, and what is alive anyway: not counted as saved for the backward pass
    repeats: int = 1  # optimizer steps of a run, say; seconds are those of one
    check: Callable[[], str] = lambda: ""  # asked after the first run: what is wrong with it, or nothing
    parts: Callable[[], Sequence[Mapping[str, float]]] = lambda: ()  # of each run so far, the seconds by part
    facts: Mapping[str, float] = {}  # figures that are known without a measurement, by name
    forget: Callable[[], None] = lambda: None  # drops what a run leaves behind: gradients, an optimizer's averages


@dataclass(frozen=True)
class Problem:
    """Inputs, on their device, and the providers that work on them; each is prepared when it is first asked for."""

    works: Mapping[str, Callable[[], Work]]
    reference: str  # the provider that the others are compared with
    dtype: torch.dtype
    exact: Callable[[], Outputs] | None = None  # in float64, where that can be had
    exact_is: str = "float64"
    tolerance: float = 0.05  # without it: of the reference's largest value
    flops: float = 0.0  # that the work cannot do without
    moved: float = 0.0  # bytes likewise, read and written
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # what a provider is called here, if not by its own name
    weights: str = "random"


@dataclass(frozen=True)
class Needs:
    """What a case cannot run without."""

    gpu: bool = False
    gib: float = 0.0  # of the GPU's memory
    packages: tuple[str, ...] = ()

    def missing(self) -> str:
        """Say what is missing, in a sentence; empty where nothing is."""
        if self.gpu and not torch.cuda.is_available():
            return f"needs a GPU with {self.gib:g} GiB"
        if self.gib and torch.cuda.is_available():
            there = torch.cuda.get_device_properties(0).total_memory / 2**30
            if there < self.gib:
                return f"needs a GPU with {self.gib:g} GiB, and this one has {there:.0f}"
        for package in self.packages:
            try:
                import_module(package)
            except ImportError as error:
                return f"needs {package}: {error}"
        return ""


@dataclass(frozen=True)
class Case:
    """One comparison.  build: a function of a module; called with the settings it returns a ``Problem``."""

    operation: str
    build: Callable[..., Problem]
    settings: Mapping[str, Any]  # plain values; they go to other processes, and into the name
    providers: tuple[str, ...]
    needs: Needs = Needs()
    memory: bool = True  # measure each provider's peak in a process of its own

    @property
    def name(self) -> str:
        return "-".join([self.operation, *(_short(key, value) for key, value in self.settings.items())])


def _short(key: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{key}{value}"


def build(case: Case) -> Problem:
    """Build the problem of a case.  Raises Unavailable where something that it needs is missing."""
    if reason := case.needs.missing():
        raise Unavailable(f"{case.operation} {reason}")
    with packages():
        return case.build(**case.settings)


def prepare(problem: Problem, provider: str) -> Work:
    with packages():
        return problem.works[provider]()


@contextmanager
def packages() -> Iterator[None]:
    """Turn a missing package into Unavailable, which names it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def differentiated(
    call: Callable[[], Outputs], leaves: Outputs, upstream: Outputs, mode: str, constant: Sequence[Tensor] = ()
) -> Work:
    """Prepare the forward pass of ``call`` with autograd recording, its backward pass, or both.

    leaves: what gradients are taken of; they must require one.  upstream: the gradient of each output of ``call``.
    Outputs: those of the forward pass by their names, the gradients as "d NAME".
    """

    def gradients(outputs: Outputs) -> Outputs:
        grads = torch.autograd.grad(
            [outputs[name] for name in upstream], list(leaves.values()), list(upstream.values()), allow_unused=False
        )
        return {f"d {name}": gradient for name, gradient in zip(leaves, grads, strict=True)}

    def both(_: Any) -> Outputs:
        outputs = call()
        return {**{name: value.detach() for name, value in outputs.items()}, **gradients(outputs)}

    if mode == "forward":
        return Work(lambda _: call(), constant=constant)
    if mode == "backward":
        return Work(gradients, call, constant)
    return Work(both, constant=constant)


MODES = ("forward", "backward", "both")
