"""The Triton sources in Triton's interpreter, in a process of its own: the variable counts before the import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "triton"


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the folder runs compiled, here")


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda file: file.stem)
def test_the_sources_in_the_interpreter(file: Path) -> None:
    interpret(str(file))


@pytest.mark.slow
def test_the_sources_in_the_interpreter_in_float32() -> None:
    """All of them in one process: what importing takes is a good part of it."""
    interpret(str(FOLDER), "-k", "float32 or not float")


def interpret(*arguments: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
