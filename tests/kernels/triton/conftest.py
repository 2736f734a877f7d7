"""The Triton sources themselves: compiled on a GPU, or interpreted where TRITON_INTERPRET=1 was set at the start.

Without a GPU ``tests/kernels/test_interpreted.py`` runs this folder in a process that has it set.  On one, what passed
is kept (``prfl_kernels.passed``): automatic takes those kernels from then on.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from prfl_kernels.dispatch import OPERATIONS, interpreting
from prfl_kernels.passed import record

REASON = "needs a GPU, or TRITON_INTERPRET=1 in a process of its own (test_interpreted.py starts one)"
CAN_RUN = find_spec("triton") is not None and (torch.cuda.is_available() or interpreting())


@pytest.fixture(scope="session", autouse=True)
def members_are_listed_once() -> Iterator[None]:
    """At every launch the interpreter looks for builtins in ``triton.language``: a quarter of these tests' time."""
    with pytest.MonkeyPatch.context() as patch:
        if CAN_RUN and interpreting():
            interpreter = import_module("triton.runtime.interpreter")
            builtins = cache(partial(inspect.getmembers, predicate=interpreter.tl.core.is_builtin))
            patch.setattr(interpreter, "inspect", SimpleNamespace(**{**vars(inspect), "getmembers": builtins}))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not CAN_RUN and "kernels/triton/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason=REASON))


def verdicts(ran: Mapping[str, set[str]]) -> dict[str, bool]:
    """By operation whether its file passed as a whole; of one that ran in part nothing, unless a test failed.

    ran: the outcomes in each file, "left out" where a test did not run.
    """
    shared = "failed" in ran.get("test_operations.py", ())  # of all of them
    found = {}
    for operation in OPERATIONS:
        outcomes = ran.get(f"test_{operation}.py", set())
        if "failed" in outcomes or (shared and outcomes):
            found[operation] = False
        elif "passed" in outcomes and "left out" not in outcomes:
            found[operation] = True
    return found


class Verdict:
    """Keeps what passed at the end of a run on a GPU in one process."""

    def __init__(self, folder: Path, keep: Callable[[dict[str, bool]], object]) -> None:
        self.folder, self.keep = folder, keep
        self.waiting: dict[str, str] = {}
        self.ran: dict[str, set[str]] = defaultdict(set)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.ran[item.path.name].add("left out")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.waiting = {item.nodeid: item.path.name for item in session.items if item.path.parent == self.folder}
        for name in {Path(argument.split("::")[0]).name for argument in session.config.args if "::" in argument}:
            self.ran[name].add("left out")  # one test of a file was asked for

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid in self.waiting:
            if report.when == "call" or report.outcome != "passed":
                self.ran[self.waiting[report.nodeid]].add(report.outcome)
            if report.when == "teardown":
                del self.waiting[report.nodeid]

    def pytest_sessionfinish(self) -> None:
        for name in self.waiting.values():
            self.ran[name].add("left out")
        if results := verdicts(self.ran):
            self.keep(results)


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available() and not interpreting() and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Verdict(Path(__file__).parent, record))


@pytest.fixture
def device() -> str:
    return "cpu" if interpreting() else "cuda"


@pytest.fixture(params=["float32", "float64", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "bfloat16" and interpreting():
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and truncates to it")
    return getattr(torch, request.param)
