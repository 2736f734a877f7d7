"""The command for a GPU's machine, with pieces that need none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl.config import load_config

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", REPOSITORY / "bench/gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_gpu", module)  # dataclass looks its module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "obstacle", lambda name: f"no module {name}" if name.startswith("no_such") else "")
    return module


def piece(gpu: Any, code: str = "print('well')", **changes: Any) -> Any:
    return replace(gpu.Piece("a", ("-c", code), ("prfl/benchmark",), (), 1.0, result=""), **changes)


def test_a_piece_runs_once_for_its_sources(gpu: Any, tmp_path: Path) -> None:
    assert gpu.state(piece(gpu), tmp_path) == "left"
    assert gpu.run(piece(gpu), tmp_path, time.monotonic() + 60) == "there"
    assert gpu.state(piece(gpu), tmp_path) == "there"
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["piece"]["last line"] == "well" and found["piece"]["exit"] == 0 and "machine" in found
    assert gpu.state(piece(gpu, of=("kernels",)), tmp_path) == "left"  # measured of other sources
    assert gpu.state(piece(gpu, name="b", needs=("no_such",)), tmp_path) == "left out: no module no_such"


def test_a_piece_that_fails_or_takes_too_long_is_not_there(gpu: Any, tmp_path: Path) -> None:
    assert gpu.run(piece(gpu, "raise SystemExit(3)"), tmp_path, time.monotonic() + 60).startswith("FAILED")
    assert gpu.run(piece(gpu, "import time; time.sleep(60)"), tmp_path, time.monotonic() + 1) == "left"
    assert gpu.state(piece(gpu), tmp_path) == "left"


def test_no_piece_starts_that_would_not_end_in_time(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    some = [piece(gpu), piece(gpu, name="b", seconds=500.0), piece(gpu, name="c")]
    monkeypatch.setattr(gpu, "pieces", lambda: iter(some))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--budget", "100", "--out", str(tmp_path)])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-4:]] == [
        ["a", "there"],
        ["b", "left"],
        ["c", "there"],
        ["1", "of", "3", "left"],
    ]


def test_the_pieces_cover_every_test_and_every_case(gpu: Any) -> None:
    from prfl.benchmark import kernel_cases, piece_cases, scale_cases

    all_pieces = list(gpu.pieces())
    assert len({piece.name for piece in all_pieces}) == len(all_pieces) and all_pieces[0].name.startswith("tests-")
    words = [(p.command[p.command.index("--benchmark-world") + 1], p.command[-1].split(" and "))
             for p in all_pieces if p.result == "--benchmark-json"]  # fmt: skip
    for world in ("wan-1.3b", "wan-14b"):
        for case in (case for module in (kernel_cases, piece_cases, scale_cases) for case in module.cases(world)):
            fits = [each for its, each in words if its == world and set(each) <= set(case.name.split("-"))]
            assert len(fits) == 1, case.name


@pytest.mark.parametrize("world", ["wan-1.3b", "wan-14b"])
def test_the_pieces_cover_every_provider_of_every_step_beside_its_reference(gpu: Any, world: str) -> None:
    from prfl.benchmark.step_cases import cases

    steps = [piece for piece in gpu.pieces() if "bench/bench_steps.py" in piece.command]
    words = [piece.command[-1] for piece in steps if piece.name.startswith(world)]
    for case in cases(world):
        reference, *others = case.providers
        assert {f"{case.operation} and ({reference} or {other})" for other in others} <= set(words)
    assert len(words) == sum(len(case.providers) - 1 for case in cases(world))
    assert all(piece.seconds <= 540 for piece in steps), "it would never start within the default budget"


def test_a_steps_words_choose_its_two_providers(gpu: Any) -> None:
    piece = next(piece for piece in gpu.pieces() if piece.name == "wan-14b-same_step-pixel_1")
    done = subprocess.run(
        [sys.executable, *piece.command, "--collect-only"], cwd=REPOSITORY, env=gpu.environment(), capture_output=True,
        text=True,
    )  # fmt: skip
    found = [line.split("[")[1] for line in done.stdout.splitlines() if "bench_steps.py::" in line]
    assert found == [f"same_step-wan-14b-frames81-chain4-{name}]" for name in ("latent", "pixel_1")], done.stdout


BARE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        gone = {"diffusers", "transformers", "peft", "pydantic", "accelerate", "jaxtyping", "rich", "numpy"}
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


def test_the_compiled_tests_want_torch_triton_and_pytest_only(gpu: Any) -> None:
    tests = [piece for piece in gpu.pieces() if not piece.result]
    options = [*tests[0].command[2:-1], "-p", "no:jaxtyping", "-p", "no:anyio", "--collect-only"]
    code = f"{BARE}\nimport pytest\nsys.exit(pytest.main({[*options, *(piece.command[-1] for piece in tests)]!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=gpu.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_cases_want_neither_diffusers_nor_peft() -> None:
    """But for a block and for peft's own rows."""
    code = BARE.replace('"jaxtyping", "rich", "numpy"', "") + (
        "from prfl.benchmark import kernel_cases, results, report\n"
        "from prfl.benchmark.problem import Unavailable, build, prepare\n"
        "case = next(case for case in kernel_cases.cases('tiny') if case.operation == 'lora_linear')\n"
        "problem = build(case)\n"
        "prepare(problem, 'ours')\n"
        "try: prepare(problem, 'peft')\n"
        "except Unavailable as reason: print(reason)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "peft is not installed", done.stderr


def test_a_measured_peak_beside_the_predicted(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """The steps that are measured are a run's: they move the adapter; here on the shapes world, the peak planted."""
    memory: Any = import_module("measured_memory")
    assert tuple(memory.CASES) == import_module("gpu_pieces").PREDICTED
    assert memory.config_of("1.3B 480p").rollout.steps == 4
    assert memory.config_of("1.3B 480p, full chain").rollout.steps == 40
    tiny = ("configs/tiny/prfl.yaml", ("reward.path=shapes", "objective={name: prfl}", "data.generator=null"), None)
    monkeypatch.setitem(memory.CASES, "tiny", tiny)
    monkeypatch.setattr(memory, "load_config", lambda file, given: load_config(file, [*given, "backbone.device=cpu"]))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**8)
    stepped = []
    monkeypatch.setattr(memory, "apply", lambda optimizer, rate: stepped.append(grad_norm(optimizer)))
    found = memory.measured("tiny")
    assert found["error"] == pytest.approx(found["predicted GB"] / 0.1 - 1) and found["predicted GB"] > 0.001
    assert len(stepped) == memory.STEPS and min(stepped) > 0


def grad_norm(optimizer: torch.optim.Optimizer) -> float:
    own = [each for group in optimizer.param_groups for each in group["params"]]
    return sum(float(each.grad.norm()) for each in own if each.grad is not None)
