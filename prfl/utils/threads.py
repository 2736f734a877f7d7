"""How torch's CPU threads wait for each other.  Imports nothing heavy: it must come before torch."""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """Make torch's CPU threads sleep soon while they wait for each other, unless the environment says how they wait.

    They spin for long by default: beside other work, a thread that spins holds the core that the other one needs.  At
    once asleep they lose time on an idle machine: GNU's library lets them look a thousand times before.  The OpenMP
    library reads the variables when torch is loaded, which must come later.  They change no number.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
