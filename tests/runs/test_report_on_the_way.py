"""A run's report is there before the run ends: after every round, and when it is stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from prfl import cli
from prfl.evaluation.report import write_report
from prfl.runs import callbacks
from prfl.training.run_folder import read_metrics
from tests.runs.test_commands import project  # noqa: F401
from tests.runs.test_lasting import ALONE, save_reward

pytestmark = pytest.mark.usefixtures("blank_pictures")
RUN = Path("runs/prfl")


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rounds that metrics.jsonl had whenever the report was written."""
    rounds: list[list[int]] = []

    def watched(run: Path) -> Path:
        rounds.append([row["step"] for row in read_metrics(run / "metrics.jsonl") if row["phase"] == "validation"])
        return write_report(run)

    monkeypatch.setattr("prfl.runs.outcomes.write_report", watched)
    return rounds


def train(*overrides: str) -> int:
    save_reward("one", 0)
    one = ["reward.path=runs/one/reward", "evaluation.every=1", "data.cache=cache"]
    return cli.main(["train", "prfl.yaml", *ALONE, *one, *overrides])


def test_it_is_written_at_every_round_with_that_round(project: Path, reports: list[list[int]]) -> None:  # noqa: F811
    assert train() == 0
    assert reports == [[0], [0, 1], [0, 1, 2], [0, 1, 2]], "and at the end"
    page = (RUN / "report.html").read_text()
    assert "policy − base" in page and "<h2>Over the steps</h2>" in page and "step 0 (base)" in page


def test_it_is_written_on_a_stop(project: Path, reports: list[list[int]], monkeypatch) -> None:  # noqa: F811
    """A signal in the middle of the second round's samples: the report has the first one."""
    outcome_of = callbacks.outcome_of

    def stopped(*args: object, **options: object) -> object:
        if len(reports) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome_of(*args, **options)

    monkeypatch.setattr(callbacks, "outcome_of", stopped)
    assert train() != 0
    assert reports == [[0], [0]] and (RUN / "report.html").is_file()
    assert [row["step"] for row in read_metrics(RUN / "metrics.jsonl") if row["phase"] == "training"] == [1]
