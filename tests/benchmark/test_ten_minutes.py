"""The ten minutes on a GPU, rehearsed without one: in the tiny world, with no package that a bare GPU image lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import ten_minutes
from bench.__main__ import main
from bench.harness import bundle
from bench.harness.results import read
from prfl.utils.errors import PrflError

REPOSITORY = Path(__file__).parents[2]
WHEELS = ("diffusers", "pydantic", "pydantic-core", "annotated-types", "typing-inspection")
# What a bare image of torch 2.11 brings of prfl's own installation, besides what these themselves need.
BARE = (
    "accelerate", "jaxtyping", "matplotlib", "peft", "pillow", "psutil", "pytest", "pytest-benchmark", "pytest-xdist",
    "platformdirs",  # mkdocs brings it here, and pytest loads its plugin, which a bare image has not
    "pyyaml", "rich",
    "safetensors", "setuptools", "tensorboard", "tokenizers", "torch", "torchmetrics", "transformers", "triton",
)  # fmt: skip
BLOCKER = """
import re
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires


def plain(name):
    return name.lower().replace("_", "-")


there, waiting = set(), {names}
while waiting:
    there.add(name := waiting.pop())
    try:
        needed = [each for each in requires(name) or () if "extra ==" not in each]
    except PackageNotFoundError:
        continue
    waiting |= {{plain(re.match(r"[\\w.-]+", each)[0]) for each in needed}} - there
absent = {{
    module
    for module, owners in packages_distributions().items()
    if not there & set(map(plain, owners)) and module not in ("prfl", "prfl_kernels")
}}
found = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if path is None and name in absent else found(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a process to which all but the bare image's packages and the wheels are missing."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCKER.format(names=set(BARE + WHEELS)))
    return {**os.environ, "PYTHONPATH": str(folder), "PRFL_COMMIT": "rehearsal", "OMP_NUM_THREADS": "1"}


def run(out: Path, environment: dict[str, str], *options: str) -> str:
    command = [sys.executable, "bench/ten_minutes.py", "--world", "tiny", "--out", str(out), *options]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Each part as its process runs it, one behind the other in this one: what is imported is imported once.
IN_ONE_PROCESS = """
import io, sys
from bench import ten_minutes_parts as parts

bundle, *names = sys.argv[1:]
for name in names:
    sys.argv, sys.stdin = ["", name, "tiny", bundle], io.StringIO("200\\n")
    parts.main()
"""


def test_the_blocker_blocks(bare: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", "import ftfy"], env=bare, capture_output=True, text=True)
    assert "No module named 'ftfy'" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_brings_every_figure_home(
    bare: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Two parts by the command, the others in one process; to compile for a CPU is left out of what they compare."""
    bare["TORCHDYNAMO_DISABLE"] = "1"
    out = tmp_path / "out"
    by_command = [word for name in ("device", "sanitizer") for word in ("--only", name)]
    printed = run(out, bare, "--budget", "500", *by_command)
    assert "2 of 2 parts done" in printed
    others = [name for name, *_ in ten_minutes.PARTS if name not in by_command]
    assert len(others) == 6
    command = [sys.executable, "-c", IN_ONE_PROCESS, str(out / "ten_minutes.jsonl"), *others]
    with_sources = {**bare, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{bare['PYTHONPATH']}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=with_sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.iterdir())) <= 8  # what comes back from a lent machine
    rows = read([out / "ten_minutes.jsonl"])
    steps = {(row.info["operation"], row.provider) for row in rows}
    assert {("step_modes", "full"), ("same_step", "latent"), ("same_step", "pixel, all frames")} <= steps
    assert {row.info["operation"] for row in rows} >= {
        "attention",
        "qk_norm_rope",
        "gated_residual_norm",
        "lora_linear",
    }
    assert all(row.info["commit"] == "rehearsal" for row in rows)
    assert all(row.info["predicted"]["peak"] > 0 for row in rows if row.info["operation"] == "step_modes")
    assert main(["report", str(out / "ten_minutes.jsonl"), "--page", str(tmp_path / "page.html")]) == 0
    report = capsys.readouterr().out
    assert "a copy moves" in report and "part device: done" in report and "kernels' tests:" in report
    assert "step_modes" in (tmp_path / "page.html").read_text()
    seconds = bundle.call_seconds(out / "ten_minutes.jsonl", "tiny", "full")
    assert 0 < seconds.forward < seconds.gradient
    assert {row["part"] for row in bundle.read_lines(out / "ten_minutes.jsonl")} == {n for n, *_ in ten_minutes.PARTS}
    again = run(out, bare, *by_command)  # the same command goes on where the last one stopped
    assert again.count("is there already") == 2


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_left_out_and_named(bare: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "bench/ten_minutes.py", "--world", "tiny", "--out", str(tmp_path), "--budget", "6"]
    done = subprocess.run([*command, "--only", "large-step"], cwd=REPOSITORY, env=bare, capture_output=True, text=True)
    assert done.returncode == 1 and "large-step: left out: " in done.stdout
    (line,) = bundle.read_lines(tmp_path / "ten_minutes.jsonl")
    assert line["end"].startswith("left out: ")


@pytest.mark.slow
def test_what_the_sanitizer_finds_fails_its_part(bare: dict[str, str], tmp_path: Path) -> None:
    """One in its place, which runs nothing: the command, the environment and the outcome are what is looked at."""
    program = tmp_path / "bin/compute-sanitizer"
    program.parent.mkdir()
    said = 'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING passed: $@"', 'echo "= ERROR SUMMARY: 1 error"'
    program.write_text("\n".join(("#!/bin/sh", *said, "[ $2 != racecheck ]")))
    program.chmod(0o755)
    bare["PATH"] = f"{program.parent}{os.pathsep}{bare['PATH']}"
    command = [sys.executable, "bench/ten_minutes.py", "--world", "tiny", "--out", str(tmp_path), "--only", "sanitizer"]
    done = subprocess.run(command, cwd=REPOSITORY, env=bare, capture_output=True, text=True)
    assert done.returncode == 1 and "sanitizer: failed with exit code 1" in done.stdout
    lines = bundle.read_lines(tmp_path / "ten_minutes.jsonl")
    assert [line["exit"] for line in lines[:2]] == [0, 1]
    note = bundle.notes(lines)[1]
    assert note.startswith("sanitizer-racecheck: 1 passed: --tool racecheck --error-exitcode 9 ")
    assert note.endswith("; ERROR SUMMARY: 1 error") and "tests/kernels/triton/test_operations.py" in note


def written(path: Path, *lines: Any, half: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + half)
    return path


def test_of_a_part_that_ran_twice_the_last_lines_count(tmp_path: Path) -> None:
    first, again = ({"part": "device", "row": "copy", "gb_per_s": speed, "seconds": 1.0} for speed in (1.0, 2.0))
    file = written(tmp_path / "a.jsonl", first, again, half='{"part": "dev')
    assert bundle.read_lines(file) == [again]
    assert bundle.notes(bundle.read_lines(file)) == ["a copy moves 2 GB/s, read and written"]


def test_a_broken_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrflError, match="no line of such a bundle"):
        bundle.read_lines(written(tmp_path / "a.jsonl", {"row": "x"}, {"part": "device", "end": "done"}))
    with pytest.raises(PrflError, match="cannot be read"):
        bundle.read_lines(tmp_path / "nowhere.jsonl")
