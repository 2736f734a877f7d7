"""The batch of a step that failed, kept for study: run/failed/step-000012/batch.safetensors and batch.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from prfl.objective import Objective
from prfl.training.checkpoint import detached_copies
from prfl.utils.files import atomic_write


def dump_batch(
    objective: Objective, run: Path, step: int, indices: Sequence[int], numbers: dict[str, float], rank: int
) -> Path:
    """Write run/failed/step-N: the drawn batch, the parameters, their gradients (safetensors) and the facts (json).

    Each process writes its own part of the batch: ``batch``, ``batch-1``, ``batch-2``.  Returns the folder.
    """
    folder = run / "failed" / f"step-{step:06d}"
    name = f"batch-{rank}" if rank else "batch"
    drawn, facts = objective.describe(step, indices)

    tensors = {f"batch/{name}": value for name, value in drawn.items()}
    for key, parameter in objective.parameters().items():
        tensors[f"parameter/{key}"] = parameter
        if parameter.grad is not None:
            tensors[f"gradient/{key}"] = parameter.grad
    with atomic_write(folder / f"{name}.safetensors") as temporary:
        save_file(detached_copies(tensors), temporary)

    shown = {key: repr(value) for key, value in numbers.items()}  # JSON has no NaN
    facts = {"step": step, "indices": list(indices), "numbers": shown} | facts
    with atomic_write(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return folder
