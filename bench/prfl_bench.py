"""The pytest plugin behind ``pytest --benchmark``: the option, which files it runs, and the fixture that measures.

Benchmarks are the files ``bench/bench_*.py``; pytest's own pattern does not match them, so nothing runs without the
option.  Time, memory and agreement are measured by ``bench.harness``; pytest-benchmark keeps and compares the files.

A module of its own and outside prfl: pytest imports its plugins before jaxtyping has hooked the import of prfl, and
jaxtyping refuses to check a package that is there already.  So prfl is imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.harness.session import Measured

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: two threads a process would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:  # as `prfl` itself
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}  # prfl.utils.threads.let_threads_sleep

FOLDER, PATTERN = "bench", "bench_*.py"
WORLDS = ("tiny", "small", "wan-1.3b", "wan-14b")
HINT = f"{FOLDER}/ holds benchmarks, which run with --benchmark only: pytest {FOLDER} --benchmark"

left_out = pytest.StashKey[bool]()
session_key = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prfl")
    group.addoption("--benchmark", action="store_true", help=f"run the benchmarks; without paths those of {FOLDER}/")
    group.addoption(
        "--benchmark-world",
        choices=WORLDS,
        help="the shapes: tiny (default without a GPU), small (default with one), or Wan's (hours: bench/gpu.py)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config, args: list[str]) -> None:
    options = early_config.known_args_namespace
    if not options.benchmark:
        return
    # What is timed runs as users run it: without the tests' checks of types and shapes.
    args[:] = [arg for arg in args if not arg.startswith("--jaxtyping-packages=")]
    if not options.file_or_dir:
        folder = str(early_config.rootpath / FOLDER)
        args.append(folder)
        options.file_or_dir.append(folder)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(of): run the test for every provider of every case in of(world)")
    if not config.getoption("benchmark"):
        if config.getoption("benchmark_world"):
            raise pytest.UsageError("--benchmark-world says what --benchmark measures: give that, too")
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e '.[dev]'")
    config.addinivalue_line("python_files", PATTERN)

    from bench.harness.session import Session

    limits = float(config.getoption("benchmark_max_time")), config.getoption("benchmark_min_rounds")
    config.stash[session_key] = Session(config.getoption("benchmark_world"), *limits)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite on all cores with ``-n auto``, but named files, and what is timed, in this process alone."""
    if config.getoption("benchmark") or config.args_source is pytest.Config.ArgsSource.ARGS:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Generator[None, Any, Any]:
    collectors = yield
    if parent.config.getoption("benchmark") or not file_path.match(f"{FOLDER}/{PATTERN}"):
        return collectors
    parent.config.stash[left_out] = True  # a file that was named on the command line would run
    return []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker and "measured" in metafunc.fixturenames:
        named = metafunc.config.stash[session_key].add(marker.kwargs["of"])
        metafunc.parametrize("measured", named, indirect=True, ids=["-".join(each) for each in named])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    benchmarks = session.config.stash.get(session_key, None)
    if benchmarks is not None:
        items = (item for item in session.items if isinstance(item, pytest.Function) and hasattr(item, "callspec"))
        benchmarks.select(item.callspec.params["measured"] for item in items if "measured" in item.callspec.params)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the files are committed: what the machine is matters, not its name


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Iterator[Measured]:
    """Measure one provider of one case; the first time, all of the case's providers that were selected.

    Before ``benchmark`` in a test's arguments: pytest-benchmark reads this one's recorded times as its timer.
    """
    from bench.harness.problem import Unavailable

    session = request.config.stash[session_key]
    try:
        figures = session.measured(*request.param)
    except Unavailable as reason:
        pytest.skip(str(reason))
    request.node.add_marker(pytest.mark.benchmark(timer=figures.timer, group=figures.group))
    yield figures
    session.done(*request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(left_out, False):
        terminalreporter.write_line(HINT, yellow=True)
    benchmarks = config.stash.get(session_key, None)
    if benchmarks is not None and benchmarks.rows:
        terminalreporter.section("measured")
        benchmarks.show(terminalreporter.write_line, terminalreporter._tw.fullwidth)
