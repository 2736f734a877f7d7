"""The schema teaches: every key has a description; every config that ships is valid and says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl.config import load_stages
from prfl.config.messages import all_keys
from prfl.config.schema import Config, StagesConfig

REPOSITORY = Path(__file__).parents[2]
SHIPPED = sorted(REPOSITORY.glob("configs/**/*.yaml"))


def test_every_key_has_a_description() -> None:
    for root in (Config, StagesConfig):
        for path, model in all_keys(root):
            description = model.model_fields[path.rpartition(".")[2]].description
            assert description and description.endswith("."), path


def test_all_keys_sees_through_the_unions() -> None:
    paths = {path for path, _ in all_keys(Config)}
    assert {"objective.last_steps", "objective.sft.every", "reward.head.blocks", "data.generator.per_prompt"} <= paths


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_are_valid_and_have_a_header(path: Path) -> None:
    assert load_stages(path)
    header = path.read_text().split("version:")[0]
    for word in ("# Reproduces:", "# Command:", "# Hardware:", "# Expected:"):
        assert word in header, word


def test_configs_ship() -> None:
    assert {"tiny.yaml", "reward.yaml", "prfl.yaml", "vader.yaml", "sft.yaml"} <= {path.name for path in SHIPPED}
