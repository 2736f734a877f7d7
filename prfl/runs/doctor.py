"""``prfl doctor``: whether this machine can run configs, or anything."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from prfl.config import Stage
from prfl.runs.dry_run import runs_of
from prfl.runs.machine import Check, check_config, check_machine
from prfl.utils.console import console
from prfl.utils.errors import PrflError


def doctor(stages: Sequence[Stage]) -> None:
    """Check this machine, and whether each of ``stages`` could run on it; PrflError with the reasons if not."""
    checks = check_machine()
    show("this machine", checks)
    problems = [f"{check.name}: {check.problem}" for check in checks if check.problem]
    for number, stage in enumerate(stages):
        checks = check_config(stage.config, runs_of(stages[:number]), stage.path)
        show(str(stage.path), checks)
        problems += [f"{stage.path}: {check.name}: {check.problem}" for check in checks if check.problem]
    if problems:  # each says its remedy
        raise PrflError("a run could not work here\n  " + "\n  ".join(problems), where="prfl doctor", fix="")


def show(title: str, checks: Sequence[Check]) -> None:
    table = Table(title, "", "", title_justify="left")
    for check in checks:
        mark = Text("no", "red") if check.problem else Text("ok", "green") if check.working else Text("-")
        table.add_row(check.name, mark, check.state)  # the problems come last, once
    console.print(table)
