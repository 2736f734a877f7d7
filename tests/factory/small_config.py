"""The config of a run of one step on tiny videos, for tests of what the model of a run is made of."""

from __future__ import annotations

from pathlib import Path

import yaml

from prfl.config import load_config
from prfl.config.schema import Config


def small_config(place: Path, model: Path, *, frames: int = 9, objective: str = "prfl", **backbone: object) -> Config:
    """Write it into ``place``, and load it.  backbone: keys of that section."""
    (place / "p.txt").write_text("a red circle\n")
    config = {
        "version": 1, "run": str(place / "run"), "seed": 0,
        "backbone": {"model": str(model), "device": "cpu", **backbone},
        "data": {
            "prompts": {"train": str(place / "p.txt")}, "cache": str(place / "cache"),
            "frames": frames, "height": 16, "width": 16, "fps": 8,
        },
        "reward": {"space": "latent", "path": "absent"}, "rollout": {"steps": 2}, "objective": {"name": objective},
        "training": {"steps": 1, "batch": 1, "learning_rate": 1e-3}, "evaluation": {"every": 0},
    }  # fmt: skip
    (place / "x.yaml").write_text(yaml.safe_dump(config))
    return load_config(place / "x.yaml", [])
