"""A reward whose dimensions and prompts are hostile text is trained to its end, and saved before anything is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl import cli
from prfl.reward.checkpoint import read_config
from tests.faults.planting import Bench

DIMENSIONS = ["quality [/10]", r"$\frac{$"]


@pytest.fixture
def hostile(bench: Bench) -> Bench:
    def change(rows: list[dict]) -> None:
        for index, row in enumerate(rows):
            row["label"] = {name: index % 2 for name in DIMENSIONS}
            row["prompt"] += " \x1b[31m[/red]{{SCRIPT}}</script>" if index < 2 else ""
            row["split"] = "train" if index < 2 else "validation"

    bench.rows(change)
    return bench


def train() -> int:
    names = ", ".join(f"'{name}'" for name in DIMENSIONS)
    return cli.main(["train", "reward.yaml", f"reward.head.dimensions=[{names}]"])


def test_it_is_trained_shown_and_saved(hostile: Bench) -> None:
    hostile.capsys.readouterr()
    assert train() == 0
    printed = hostile.capsys.readouterr().out
    assert "quality [/10]" in printed and r"$\frac{$" in printed and "\x1b" not in printed
    saved = read_config("runs/reward/reward")
    assert list(saved["normalisation"]["mean"]) == DIMENSIONS
    page = Path("runs/reward/report.html").read_text()
    assert "quality [/10]" in page and "<script" not in page and "\x1b" not in page


def test_it_is_saved_whatever_printing_comes_to(hostile: Bench) -> None:
    hostile.patch.setattr("prfl.runs.train_reward.tables.ranking_tables", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train()
    assert Path("runs/reward/reward/config.json").is_file() and Path("runs/reward/reward_eval.json").is_file()
