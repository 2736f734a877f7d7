"""``prfl train --dry-run``: a stage's cost, its predicted memory, whether it fits a card, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl.config import Stage
from prfl.config.schema import Config
from prfl.estimate import tables
from prfl.estimate.cost import count_cost
from prfl.estimate.fitting import Prediction, fit, on_gpu
from prfl.estimate.missing_inputs import missing_inputs
from prfl.estimate.work import CARD_SIZES
from prfl.factory.backbone import device_kind
from prfl.factory.prompts import check_frames, load_prompts
from prfl.utils.console import console


def dry_run(stage: Stage, earlier: Sequence[Stage] = (), gpu: int | None = None, quiet: bool = False) -> None:
    """Print a stage's cost and its predicted memory, and unless quiet its sizes and what it lacks after ``earlier``.

    gpu: gigabytes of a card (``CARD_SIZES``): as on such a card, and what to change until the stage fits it.
    """
    config = stage.config if gpu is None else on_gpu(stage.config)
    console.print(f"\n{stage.path}", style="bold", markup=False)
    prediction = Prediction.of(config)
    model, memory = prediction.model, prediction.memory
    check_frames(config, load_prompts(config.data), model)
    costs = count_cost(config, model, memory.phases)
    if not quiet:
        console.print(tables.size_table(config, model, memory.trainable))
    card = CARD_SIZES[gpu] if gpu else tables.smallest_card(memory.peak) if device_kind(config) == "cuda" else None
    console.print(tables.memory_table(config, memory))
    console.print(tables.cost_table(config, costs, card))
    if gpu:
        console.print(tables.fit_table(fit(prediction, CARD_SIZES[gpu])))
    if memory.assumed:
        console.print(f"assumed: {memory.assumed}", markup=False)
    if not quiet:
        show_missing(config, stage.path, runs_of(earlier))


def show_missing(config: Config, path: Path, filled: Sequence[Path]) -> None:
    missing = missing_inputs(config, filled, path)
    console.print("not here yet:" if missing else "everything that the run reads is here", style="bold")
    for line in missing:
        console.print(f"  {path}: {line}", markup=False, soft_wrap=True)


def runs_of(stages: Sequence[Stage]) -> list[Path]:
    return [stage.config.run for stage in stages]
