"""The rest of the gate, so that ``pytest`` is the whole of it.  ``pytest -m 'not gate'`` leaves it out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CHECKS = {
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "types": ["-m", "mypy"],
    "layers": ["-c", LINT_IMPORTS],
}


@pytest.mark.gate
@pytest.mark.parametrize("check", CHECKS)
def test_gate(check: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    run = subprocess.run(
        [sys.executable, *CHECKS[check]], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
