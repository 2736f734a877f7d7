"""The option itself, in processes of their own and in a project of a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.problem import Case, Problem, Unavailable
from bench.harness.session import Session

REPOSITORY = Path(__file__).parents[2]
SETTINGS = f"""
[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = [".", "{REPOSITORY / "bench"}", "{REPOSITORY}", "{REPOSITORY / "kernels"}"]
addopts = ["--import-mode=importlib", "--jaxtyping-packages=prfl,beartype.beartype", "-p", "prfl_bench"]
"""
BENCH = """
import pytest
import torch

from bench.harness.problem import Case, Needs, Problem, Work

def adding(width, world=""):
    x = torch.ones(width)
    def absent():
        import no_such_package
    works = {"plain": lambda: Work(lambda _: {"y": x + 1}), "other": lambda: Work(lambda _: {"y": 1 + x}),
             "wrong": lambda: Work(lambda _: {"y": x + 2}), "absent": absent}
    return Problem(works, "plain", torch.float32)

def cases(world):
    yield Case("adding", adding, {"world": world, "width": 4}, ("plain", "other", "wrong", "absent"), memory=False)
    yield Case("large", adding, {"width": 4}, ("plain",), Needs(packages=("no_such_package",)))

@pytest.mark.cases(of=cases)
def test_adding(measured, benchmark):
    measured.into(benchmark)
"""
WRONG_ORDER = BENCH.replace("measured, benchmark", "benchmark, measured")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    for name, text in {
        "tests/test_a.py": "def test_a(): pass",
        "bench/bench_a.py": BENCH,
        "bench/study.py": "x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run(project: Path, *arguments: str, command: Sequence[str] = ("-m", "pytest")) -> tuple[int, str]:
    own = ("PYTHONPATH", "PYTEST_")  # of the run that this test is part of
    environment = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    done = subprocess.run(
        [sys.executable, *command, "-p", "no:cacheprovider", *arguments],
        cwd=project, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", [("-m", "pytest"), ("-c", "import sys, pytest; sys.exit(pytest.console_main())")])
def test_plain_pytest_runs_the_tests_and_no_benchmark(project: Path, command: Sequence[str]) -> None:
    code, text = run(project, command=command)
    assert code == 0 and "1 passed" in text and "bench_a" not in text


@pytest.mark.parametrize("path", ["bench", "bench/bench_a.py"])
def test_a_benchmark_without_the_option_does_not_run_and_says_why(project: Path, path: str) -> None:
    code, text = run(project, path)
    assert code != 0 and "passed" not in text
    assert "which run with --benchmark only: pytest bench --benchmark" in text


def test_with_the_option_the_benchmarks_run_and_no_test(project: Path) -> None:
    code, text = run(project, "--benchmark", "--benchmark-json=a.json", "--benchmark-min-rounds=3", "-rs")
    assert code == 1 and "1 failed, 2 passed, 2 skipped" in text and "tests/" not in text
    assert "wrong did not compute what plain did: y" in text
    assert "no_such_package is not installed" in text and "large needs no_such_package" in text
    assert "times as fast" in text  # our table, beside pytest-benchmark's
    (first, second) = json.loads((project / "a.json").read_text())["benchmarks"]
    assert [each["extra_info"]["provider"] for each in (first, second)] == ["plain", "other"]
    assert second["fullname"] == "bench/bench_a.py::test_adding[adding-tiny-width4-other]"
    assert second["group"] == "adding-tiny-width4" and len(second["stats"]["data"]) == second["stats"]["rounds"] >= 3
    rounds = [each * 1000 for each in second["stats"]["data"]]
    assert second["extra_info"]["rounds_ms"] == pytest.approx(rounds, rel=1e-5)


@pytest.mark.slow
def test_files_are_compared_as_pytest_benchmark_does(project: Path) -> None:
    chosen = ("bench", "--benchmark", "--benchmark-max-time=0.01", "-k", "plain or other")
    run(project, *chosen, "--benchmark-autosave")
    assert len(list(project.glob(".benchmarks/*/0001_*.json"))) == 1
    code, text = run(project, *chosen, "--benchmark-compare")
    assert code == 0 and "Comparing against benchmarks from" in text and "(0001_" in text and "(NOW)" in text


@pytest.mark.slow
def test_a_world_is_chosen_and_needs_the_option(project: Path) -> None:
    world = "--benchmark-world=small"
    assert "adding-small-width4" in run(project, "--benchmark", world, "--collect-only", "-q")[1]
    assert run(project, world)[0] == 4 and "invalid choice" in run(project, "--benchmark", "--benchmark-world=x")[1]


@pytest.mark.parametrize("gpu, world", [(False, "tiny"), (True, "small")])
def test_the_world_of_no_choice_takes_no_hours(gpu: bool, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert Session(None, 1.0, 5).world == world and Session("wan-1.3b", 1.0, 5).world == "wan-1.3b"


def failing(name: str, ran: list[str], error: Exception) -> Any:
    def made() -> Problem:
        ran.append(name)
        raise error

    return Case(name, made, {}, ("a", "b"))


@pytest.mark.parametrize("error", [ValueError("a mistake"), Unavailable("no room")])
def test_a_case_that_fails_as_a_whole_is_tried_once(error: Exception) -> None:
    ran: list[str] = []
    session = Session("tiny", 0.0, 1)
    session.select(session.add(lambda world: [failing("case", ran, error)]))
    for provider in ("a", "b"):
        if isinstance(error, Unavailable):
            with pytest.raises(Unavailable):
                session.measured("case", provider)
        else:
            assert str(session.measured("case", provider).failure) == "a mistake"
        session.done("case", provider)
    assert ran == ["case"]


@pytest.mark.slow
def test_the_order_of_the_fixtures_is_checked(project: Path) -> None:
    (project / "bench/bench_a.py").write_text(WRONG_ORDER)
    code, text = run(project, "--benchmark", "-k", "plain and adding")
    assert code == 1 and "put the fixture 'measured' before 'benchmark'" in text


@pytest.mark.slow
def test_jaxtyping_checks_prfl_in_tests_and_nothing_in_benchmarks(project: Path) -> None:
    code = (
        "def test_a():\n import prfl.utils.rng, prfl.utils.errors\n prfl.utils.errors.PrflError('a', where=1, fix='')"
    )
    (project / "tests/test_a.py").write_text(code)
    # Bytecode without checks may lie under the hook's name: a checked module has imported this one (tests/conftest.py).
    for file in (REPOSITORY / "prfl/utils/__pycache__").glob("errors.*jaxtyping*"):
        file.unlink(missing_ok=True)
    assert "TypeCheckError" in run(project)[1]
    (project / "bench/bench_a.py").write_text(code)
    assert "1 passed" in run(project, "--benchmark")[1]


def test_importing_the_package_stays_light() -> None:
    code = "import sys, prfl, bench.harness; print('torch' in sys.modules, 'pytest' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")
    assert done.stdout.strip() == "False False", done.stderr
