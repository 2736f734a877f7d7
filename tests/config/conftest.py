from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = """\
version: 1
run: runs/x
seed: 0
backbone: {model: shapes, adapter: {rank: 4, alpha: 4}}
data:
  generator: {name: shapes_mixture, count: 4}
  prompts: {train: shapes}
  cache: cache
  frames: 17
  height: 32
  width: 32
  fps: 8
reward: {space: latent, path: somewhere}
rollout: {steps: 10}
objective: {name: prfl, sft: {}}
training: {steps: 1, batch: 2, learning_rate: 1e-5}
evaluation: {every: 0}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(text, name) puts a config into a temporary folder."""

    def write(text: str = CONFIG, name: str = "x.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write
