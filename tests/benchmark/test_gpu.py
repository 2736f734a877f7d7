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
from _pytest.mark.expression import Expression

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
    on(module, monkeypatch, "small", 80.0)
    return module


def on(gpu: Any, monkeypatch: pytest.MonkeyPatch, name: str, gib: float) -> None:
    monkeypatch.setattr(gpu, "device", lambda: gpu.Device(name, gib))


def piece(gpu: Any, code: str = "print('well')", **changes: Any) -> Any:
    return replace(gpu.Piece("a", ("-c", code), ("bench/harness",), (), 1.0, result=""), **changes)


def test_a_piece_runs_once_for_its_sources(gpu: Any, tmp_path: Path) -> None:
    assert gpu.state(piece(gpu), tmp_path) == "left"
    assert gpu.run(piece(gpu), tmp_path, time.monotonic() + 60) == "there"
    assert gpu.state(piece(gpu), tmp_path) == "there"
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["piece"]["last line"] == "well" and found["piece"]["exit"] == 0 and "machine" in found
    assert gpu.state(piece(gpu, of=("kernels",)), tmp_path) == "left"  # measured of other sources
    assert gpu.state(piece(gpu, name="b", needs=("no_such",)), tmp_path) == "left out: no module no_such"


def test_a_piece_that_fails_is_tried_again_on_another_device_or_with_other_sources(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = piece(gpu, "import sys; print('because'); sys.exit(3)")
    assert gpu.run(bad, tmp_path, time.monotonic() + 60).startswith("FAILED")
    assert gpu.state(bad, tmp_path) == "FAILED on this device: because" and not (tmp_path / "a.json").exists()
    assert gpu.state(replace(bad, of=("kernels",)), tmp_path) == "left"
    on(gpu, monkeypatch, "other", 80.0)
    assert gpu.state(bad, tmp_path) == "left"
    assert gpu.run(piece(gpu), tmp_path, time.monotonic() + 60) == "there"
    assert not (tmp_path / "a.failed").exists()


def benchmark(gpu: Any, rows: int, *lines: str) -> Any:
    """A piece that writes so many rows and says these lines at its end."""
    written = {"benchmarks": [{"stats": {}}] * rows}
    code = f"import sys; open(sys.argv[1][7:], 'w').write({json.dumps(written)!r}); print({chr(10).join(lines)!r})"
    return piece(gpu, code, result="--file")


def test_a_piece_that_skipped_everything_failed(gpu: Any, tmp_path: Path) -> None:
    nothing = benchmark(gpu, 0, "SKIPPED [1] bench/x.py: needs a GPU with 60 GiB", "1 skipped in 2s")
    assert gpu.run(nothing, tmp_path, time.monotonic() + 60).startswith("FAILED")
    state = gpu.state(nothing, tmp_path)
    assert state == "FAILED on this device: SKIPPED [1] bench/x.py: needs a GPU with 60 GiB"


@pytest.mark.parametrize("reason, again", [("out of memory: CUDA", True), ("liger_kernel is not installed", False)])
def test_what_had_no_room_is_run_again_on_a_larger_card(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, again: bool
) -> None:
    some = benchmark(gpu, 1, f"SKIPPED [1] bench/x.py: {reason}", "1 passed, 1 skipped in 2s")
    assert gpu.run(some, tmp_path, time.monotonic() + 60) == "there" == gpu.state(some, tmp_path)
    on(gpu, monkeypatch, "large", 139.0)
    assert gpu.state(some, tmp_path) == ("left" if again else "there")


def test_a_piece_that_needs_more_memory_waits_for_a_larger_card(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.state(piece(gpu, gib=112.0), tmp_path) == "left out: needs 112 GiB, and this GPU has 80"
    on(gpu, monkeypatch, "large", 139.0)
    assert gpu.state(piece(gpu, gib=112.0), tmp_path) == "left"


@pytest.mark.slow
def test_a_piece_that_takes_too_long_wants_more_time(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    slow = piece(gpu, "import time; time.sleep(60)")
    assert gpu.run(slow, tmp_path, time.monotonic() + 2) == "left" == gpu.state(slow, tmp_path)
    assert 3 <= gpu.lasting(slow, tmp_path) < 10 and slow.seconds == 1
    monkeypatch.setattr(gpu, "pieces", lambda: iter([slow]))
    monkeypatch.setattr("sys.argv", ["gpu.py", "--budget", "2", "--out", str(tmp_path)])
    gpu.main()
    assert "left, and wants" in capsys.readouterr().out
    on(gpu, monkeypatch, "other", 80.0)
    assert gpu.lasting(slow, tmp_path) == 1


def test_wheels_of_what_torch_is_built_with_are_left_alone(gpu: Any) -> None:
    names = ["torch-2.13.0-cp311.whl", "triton-3.9.0-cp311.whl", "nvidia_cublas_cu12-12.whl", "cuda_bindings-13.whl"]
    assert all(map(gpu.left_alone, names))
    assert not any(
        map(gpu.left_alone, ["torchmetrics-1.9.0-py3-none-any.whl", "tritonclient-2.whl", "diffusers-1.whl"])
    )


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


def chosen(piece: Any, name: str) -> bool:
    """Whether its -k chooses the test of this name, as pytest reads it."""
    return Expression.compile(piece.command[-1]).evaluate(lambda word, **_: word in name)


@pytest.mark.parametrize("world", ["wan-1.3b", "wan-14b"])
def test_every_provider_of_every_case_is_in_one_piece_or_left_out_for_a_reason(gpu: Any, world: str) -> None:
    from bench.cases import kernel_cases, piece_cases, reward_cases, scale_cases, step_cases
    from bench.gpu_pieces import LEFT_OUT, pieces

    every = list(pieces())
    assert len({piece.name for piece in every}) == len(every) and every[0].name.startswith("tests-")
    left_out = set()
    for module in (kernel_cases, piece_cases, reward_cases, scale_cases, step_cases):
        file = f"bench/bench_{module.__name__.split('.')[-1].removesuffix('_cases')}s.py".replace("scales", "scale")
        own = [each for each in every if file in each.command and world in each.command]
        for case, provider in ((each, name) for each in module.cases(world) for name in each.providers):
            name = f"{file}::test[{case.name}-{provider}]"
            why = [words for words in LEFT_OUT if all(word in name for word in words.split())]
            found = [each.name for each in own if chosen(each, name)]
            left_out.update(why)
            several = module is step_cases and provider == case.providers[0]  # the reference, beside each
            assert bool(why) != bool(found) and (several or len(found) <= 1), (name, found, why)
    assert left_out == {words for words in LEFT_OUT if world in words or "wan" not in words}


def test_what_a_piece_measures_is_there(gpu: Any) -> None:
    """A path that is gone would be hashed as nothing, and a piece would not run again when what it measures changes."""
    assert [part for piece in gpu.pieces() for part in piece.of if not (REPOSITORY / part).exists()] == []


def test_every_piece_can_start_and_end_within_the_default_budget(gpu: Any) -> None:
    late = [piece.name for piece in gpu.pieces() if piece.seconds > 540 or piece.gib > 139]
    assert late == []
    summary, first = [piece for piece in gpu.pieces() if not piece.name.startswith("tests-")][:2]
    assert (
        summary.name == "ten-minutes"
        and first.name == "wan-1.3b-same_step-pixel_all"
        and first.gib > 80
        and first.seconds < 310
    )


COLLECTED = {
    "wan-14b-same_step-pixel_1": ["same_step-wan-14b-frames49-chain4-latent", "-pixel_1"],
    "wan-14b-rival_prfl-ours": ["rival_prfl-wan-14b-frames81-chain4-rival", "-ours"],
    "wan-14b-gradient_call-full-kernels": ["gradient_call-wan-14b-full, kernels"],
    "wan-1.3b-scale-frames-value81-vader": ["scale-wan-1.3b-frames-value81-vader"],
}


@pytest.mark.slow
def test_pytest_reads_a_pieces_words_so(gpu: Any) -> None:
    """Each command as it is, but all in one process: its imports are nearly all of its time."""
    commands = [next(piece.command for piece in gpu.pieces() if piece.name == name) for name in COLLECTED]
    assert all(command[:2] == ("-m", "pytest") for command in commands)
    arguments = [[*command[2:], "--collect-only"] for command in commands]
    code = f"import pytest\nfor each in {arguments!r}:\n    print('a piece')\n    pytest.main(each)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=gpu.environment(), capture_output=True, text=True
    )
    pieces = done.stdout.split("a piece\n")[1:]
    for found, shown in zip(COLLECTED.values(), pieces, strict=True):
        tests = [line.split("[")[1].rstrip("]") for line in shown.splitlines() if "::test" in line]
        assert len(tests) == len(found) and all(a.endswith(b) for a, b in zip(tests, found, strict=True)), shown


BARE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        gone = {"diffusers", "transformers", "peft", "pydantic", "accelerate", "jaxtyping", "rich", "numpy"}
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


@pytest.mark.slow
def test_the_compiled_tests_want_torch_triton_and_pytest_only(gpu: Any) -> None:
    tests = [piece for piece in gpu.pieces() if piece.name.startswith("tests-")]
    options = [*tests[0].command[2:-1], "-p", "no:jaxtyping", "-p", "no:anyio", "--collect-only"]
    code = f"{BARE}\nimport pytest\nsys.exit(pytest.main({[*options, *(piece.command[-1] for piece in tests)]!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=gpu.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_kernels_cases_want_neither_diffusers_nor_peft() -> None:
    """But for a block and for peft's own rows."""
    code = BARE.replace('"jaxtyping", "rich", "numpy"', "") + (
        "from bench.cases import kernel_cases\nfrom bench.harness import results, report\n"
        "from bench.harness.problem import Unavailable, build, prepare\n"
        "case = next(case for case in kernel_cases.cases('tiny') if case.operation == 'lora_linear')\n"
        "problem = build(case)\n"
        "prepare(problem, 'ours')\n"
        "try: prepare(problem, 'peft')\n"
        "except Unavailable as reason: print(reason)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "peft is not installed", done.stderr


@pytest.mark.slow
def test_a_measured_peak_beside_the_predicted(monkeypatch: pytest.MonkeyPatch, gpu: Any) -> None:
    """The steps that are measured are a run's: they move the adapter; here on the shapes world, the peaks planted."""
    memory: Any = import_module("bench.measured_memory")
    pieces: Any = import_module("bench.gpu_pieces")
    chains = {name for name in memory.CASES if name.startswith("14B") and "chain" in name}
    pictures = {name for name in memory.CASES if name.startswith("I2V")}
    assert set(pieces.PREDICTED) == memory.CASES.keys() - chains - pictures
    assert memory.config_of("1.3B 480p").rollout.steps == 4
    assert memory.config_of("1.3B 480p, full chain").rollout.steps == 40
    tiny = ("configs/tiny/prfl.yaml", ("reward.path=shapes", "objective={name: prfl}", "data.generator=null"), None)
    monkeypatch.setitem(memory.CASES, "tiny", tiny)
    monkeypatch.setattr(memory, "load_config", lambda file, given: load_config(file, [*given, "backbone.device=cpu"]))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**8)
    stepped = []
    monkeypatch.setattr(memory, "apply", lambda optimizer, rate: stepped.append(grad_norm(optimizer)))
    found = memory.measured("tiny")
    assert found["error"] == pytest.approx(found["predicted GB"] / 0.1 - 1) and found["predicted GB"] > 0.001
    assert found["phases"].keys() == {"rollout", "reward", "backward"}
    assert all(each["measured GB"] == 0.1 for each in found["phases"].values())
    assert max(each["predicted GB"] for each in found["phases"].values()) == found["predicted GB"]
    assert len(stepped) == memory.STEPS and min(stepped) > 0


def grad_norm(optimizer: torch.optim.Optimizer) -> float:
    own = [each for group in optimizer.param_groups for each in group["params"]]
    return sum(float(each.grad.norm()) for each in own if each.grad is not None)
