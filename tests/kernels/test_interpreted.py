"""The Triton sources in Triton's interpreter, in a process of its own: the variable counts before the import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = sorted(Path(__file__).parent.glob("triton/test_*.py"))


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the folder runs compiled, here")


@pytest.mark.slow
@pytest.mark.parametrize("files", [FILES[start::3] for start in range(3)], ids=lambda files: files[0].stem)
def test_the_sources_in_the_interpreter(files: list[Path]) -> None:
    """Three processes, because what importing takes is a good part of each."""
    interpret(*map(str, files))


def interpret(*arguments: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
