"""``prfl train --dry-run``: a stage's sizes, network evaluations and predicted memory, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl.config import Stage
from prfl.estimate import tables
from prfl.estimate.memory import predict_memory
from prfl.estimate.missing_inputs import missing_inputs
from prfl.estimate.nfe import count_nfe
from prfl.factory.backbone import build_architecture
from prfl.utils.console import console


def dry_run(stage: Stage, earlier: Sequence[Stage] = ()) -> None:
    """Print a stage's sizes, network evaluations and predicted memory, and what it lacks after the ``earlier`` ones."""
    config = stage.config
    model = build_architecture(config)
    counts, memory = count_nfe(config, model), predict_memory(config, model)
    console.print(f"\n{stage.path}", style="bold", markup=False)
    console.print(tables.size_table(config, model, memory.trainable))
    console.print(tables.nfe_table(counts))
    console.print(tables.memory_table(config, memory))
    if memory.assumed:
        console.print(f"assumed: {memory.assumed}", markup=False)
    missing = missing_inputs(config, runs_of(earlier), stage.path)
    console.print("not here yet:" if missing else "everything that the run reads is here", style="bold")
    for line in missing:
        console.print(f"  {stage.path}: {line}", markup=False, soft_wrap=True)


def runs_of(stages: Sequence[Stage]) -> list[Path]:
    return [stage.config.run for stage in stages]
