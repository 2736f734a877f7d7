"""A small config to predict: PRFL on a random model of five blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from prfl.config import load_config
from prfl.config.schema import Config


@pytest.fixture(scope="session")
def five_blocks(tmp_path_factory: pytest.TempPathFactory, make_tiny_pipeline: Callable[..., Path]) -> Path:
    """Read only: a random model of five blocks."""
    return make_tiny_pipeline(tmp_path_factory.mktemp("models") / "five", num_layers=5)


@pytest.fixture
def make(tmp_path: Path, five_blocks: Path) -> Callable[..., Config]:
    """make("a.b=value", ...): PRFL on a random model of five blocks, unless changed."""
    return configs(tmp_path, five_blocks)


@pytest.fixture(scope="module")
def make_once(tmp_path_factory: pytest.TempPathFactory, five_blocks: Path) -> Callable[..., Config]:
    """``make``, for what the tests of a file share."""
    return configs(tmp_path_factory.mktemp("configs"), five_blocks)


def configs(tmp_path: Path, folder: Path) -> Callable[..., Config]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle\n")
    config = {
        "version": 1,
        "run": str(tmp_path / "run"),
        "seed": 0,
        "backbone": {"model": str(folder), "device": "cpu", "adapter": {"rank": 2, "alpha": 2}},
        "data": {
            "prompts": {"train": str(prompts)}, "cache": str(tmp_path), "frames": 17, "height": 32, "width": 32,
            "fps": 8,
        },
        "reward": {"space": "latent", "path": str(tmp_path / "absent")},
        "rollout": {"steps": 6},
        "objective": {"name": "prfl"},
        "training": {"steps": 5, "batch": 4, "accumulation": 2, "learning_rate": 1e-4},
        "evaluation": {"every": 0},
    }  # fmt: skip
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(config))
    return lambda *overrides: load_config(path, overrides)
