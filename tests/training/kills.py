"""kill -9 at many moments, double starts and every signal, as one table: ``python -m tests.training.kills [MOMENTS]``.

The real command on a tiny model, in one folder that is gone on with after each blow; at the end every byte of it must
be that of a run that nobody disturbed.  The suite does the same at few moments (test_kill.py).
"""

from __future__ import annotations

import itertools
import signal
import sys
import tempfile
from pathlib import Path

from tests.training import killed_run
from tests.training.killed_run import at_random, at_the_start, in_a_save, kill_9, same, start_twice, stop_by
from tests.training.signals import not_ignored

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main(folder: Path, moments: int) -> None:
    steps = 6 * moments + 30
    killed_run.write_project(folder, steps)
    kinds = itertools.cycle((at_random, in_a_save, at_the_start))
    rows = [{"blow": "kill -9", **kill_9(moment)} for moment in itertools.islice(kinds, moments)]
    rows += [{"blow": f"{number.name}, twice", **stop_by(number)} for number in SIGNALS]
    rows += [{"blow": "double start", **start_twice("killed")}]
    for number in range(4):
        rows += [{"blow": "double start of a new run", **start_twice(f"new-{number}", "training.steps=3")}]
    same("killed")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in columns) + " |")
    print(f"{len(rows)} blows; the run that they hit equals the straight run bit for bit")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, not_ignored():
        main(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 25)
