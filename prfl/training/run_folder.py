"""The folder of a run: where everything of it lies, what is written there at its start, and its metrics.jsonl."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prfl.utils.files import atomic_write, restore_folders
from prfl.utils.metrics_file import records

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")


@dataclass(frozen=True)
class RunFolder:
    """Where everything of a run lies.

    config.yaml (resolved), environment.json, metrics.jsonl, trackers/, checkpoints/, samples/, failed/, report.html

    resolved_config: yaml text.  Nothing is written before ``begin``, so a run that is refused leaves no trace, and the
    config of a run that may not be resumed with this one stays as it is.
    """

    path: Path
    resolved_config: str = ""

    def begin(self) -> None:
        """Make the folder, and write the resolved config and the environment into it.

        Call it while the folder is this process's (prfl/utils/lock.py): what a crash left half written is removed.
        """
        halves = [*self.path.rglob(".tmp-*"), *self.path.rglob(".old-*")]
        for folder in {half.parent for half in halves}:
            restore_folders(folder)
        texts = {"environment.json": json.dumps(environment(), indent=2) + "\n"}
        if self.resolved_config:
            texts["config.yaml"] = self.resolved_config
        for name, text in texts.items():
            with atomic_write(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"


def environment() -> dict[str, str | int]:
    """Return versions and device: what decides whether a run can be repeated."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    facts: dict[str, str | int] = {"python": platform.python_version(), "platform": platform.platform()}
    return facts | {"device": device, "threads": torch.get_num_threads()} | {name: version(name) for name in PACKAGES}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without the lines that a crash has damaged."""
    return records(path)[0]


def drop_metrics_after(path: Path, step: int) -> int:
    """Remove what a run wrote after the checkpoint from which it is now resumed; returns how many lines were damaged.

    Those steps are run again, and so is the validation after that very step.  Damaged lines go too, and rows of an
    older version are written as those of this one.
    """
    before, damaged = records(path)
    if before or damaged:
        remaining = [r for r in before if r["step"] < step or (r["step"] == step and r["phase"] == "training")]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in remaining), encoding="utf-8")
    return damaged
