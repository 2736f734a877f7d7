"""How torch's CPU threads wait for each other.  Imports nothing heavy: it must come before torch."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Make torch's CPU threads sleep soon while they wait for each other, unless the environment says how they wait.

    By default a waiting thread spins for long, and so holds a core that other work needs.  A thread that sleeps at once
    loses time on an idle machine, so with GNU's OpenMP library it spins a thousand times first.  OpenMP reads these
    environment variables when torch is loaded, so this must be called before.  No result changes.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
