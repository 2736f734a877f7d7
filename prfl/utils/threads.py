"""How torch's CPU threads wait for each other.  Imports nothing heavy: it must come before torch."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Make torch's CPU threads sleep while they wait for each other, unless the environment says how they wait.

    They spin by default: beside other work, a thread that spins holds the core that the other one needs.  The OpenMP
    library reads the variable when torch is loaded, which must come later.  It changes no number.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ["OMP_WAIT_POLICY"] = "passive"
