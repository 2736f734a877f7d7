"""A run that is stopped at any moment equals the straight run bit for bit: the real command, killed in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX")
def test_stopped_runs_equal_the_straight_run_bit_for_bit(tmp_path: Path) -> None:
    """5 + 5 steps, and a run that is killed -9 three times (twice in the middle of a save) and then stopped by SIGTERM
    and by Ctrl-C.  One process imports torch once and forks a child for every run."""
    root = SCRIPT.parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "all equal", run.stdout
