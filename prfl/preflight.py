"""The commands that come before a run: ``prfl train --dry-run`` and ``prfl doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from prfl import build
from prfl.commands import console
from prfl.config import Stage
from prfl.errors import PrflError
from prfl.forecast import count_work, missing_inputs, predict_memory, tables
from prfl.forecast.doctor import Check, check_config, check_machine


def dry_run(stage: Stage, earlier: Sequence[Stage] = ()) -> None:
    """Sizes, network evaluations and predicted memory of a stage, and what it lacks after the ``earlier`` ones."""
    config = stage.config
    model = build.architecture(config)
    work, memory = count_work(config, model), predict_memory(config, model)
    console.print(f"\n{stage.path}", style="bold", markup=False)
    console.print(tables.size_table(config, model, memory.trainable))
    console.print(tables.work_table(work))
    console.print(tables.memory_table(config, memory))
    if memory.assumed:
        console.print(f"assumed: {memory.assumed}", markup=False)
    missing = missing_inputs(config, runs_of(earlier))
    console.print("not here yet:" if missing else "everything that the run reads is here", style="bold")
    for line in missing:
        console.print(f"  {stage.path}: {line}", markup=False, soft_wrap=True)


def doctor(stages: Sequence[Stage]) -> None:
    """Check this machine, and whether each of ``stages`` could run on it; PrflError with the reasons if not."""
    show("this machine", found := check_machine())
    problems = [f"{check.name}: {check.problem}" for check in found if check.problem]
    for number, stage in enumerate(stages):
        show(str(stage.path), found := check_config(stage.config, runs_of(stages[:number])))
        problems += [f"{stage.path}: {check.name}: {check.problem}" for check in found if check.problem]
    if problems:
        raise PrflError(
            "a run could not work here\n  " + "\n  ".join(problems), where="prfl doctor", fix=""
        )  # each says it


def runs_of(stages: Sequence[Stage]) -> list[Path]:
    return [stage.config.run for stage in stages]


def show(title: str, checks: Sequence[Check]) -> None:
    table = Table(title, "", "", title_justify="left")
    for check in checks:
        mark = Text("no", "red") if check.problem else Text("ok", "green") if check.working else Text("-")
        text = f"{check.found}; {check.problem}" if check.problem else check.found
        table.add_row(check.name, mark, text)
    console.print(table)
