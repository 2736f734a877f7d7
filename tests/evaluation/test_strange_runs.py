"""The report of a stranger's run folder: it shows what lies in the folder, and says what it leaves out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from prfl.evaluation import run_files
from prfl.evaluation.policy_eval import write_results
from prfl.evaluation.report import write_report, write_samples_page
from tests.evaluation.test_policy_eval import outcome

SECRET = "the secret of whoever makes the page"


@pytest.fixture
def run(tmp_path: Path, blank_pictures: None) -> Path:
    (tmp_path / "secret.mp4").write_text(SECRET)
    run = tmp_path / "run"
    write_results(run / "samples" / "final", [outcome("base"), outcome("policy", 0.3)], fps=8.0)
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    return run


def named(run: Path, file: str) -> None:
    """A results.json whose first video is that file."""
    path = run / "samples/final/results.json"
    results = json.loads(path.read_text())
    results["videos"][0]["files"]["base"] = file
    path.write_text(json.dumps(results))


def linked(run: Path) -> None:
    (run / "samples/final/videos/base-000.mp4").unlink()
    os.symlink(run.parent / "secret.mp4", run / "samples/final/videos/base-000.mp4")


def linked_folder(run: Path) -> None:
    os.symlink(run.parent, run / "samples/final/more")
    named(run, "more/secret.mp4")


def replaced(name: str) -> Callable[[Path], None]:
    def replace(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        os.symlink(run.parent / "secret.mp4", run / name)

    return replace


PLANTED = {
    "a path upwards": (lambda run: named(run, "../../../secret.mp4"), "leads out of the run folder"),
    "an absolute path": (lambda run: named(run, str(run.parent / "secret.mp4")), "leads out of the run folder"),
    "a link": (linked, "leads out of the run folder"),
    "a folder that is a link": (linked_folder, "leads out of the run folder"),
    "another file of the run": (lambda run: named(run, "../../config.yaml"), "is not a video that prfl wrote"),
    "a file that is not there": (lambda run: named(run, "videos/9.mp4"), "cannot be read (No such file"),
    "a NUL in the name": (lambda run: named(run, "videos/\0.mp4"), "cannot be read"),
    "a pipe": (lambda run: (os.mkfifo(run / "samples/final/p.mp4"), named(run, "p.mp4")), "is no file"),
    "a config that is a link": (replaced("config.yaml"), "config.yaml: leads out"),
    "metrics that are a link": (replaced("metrics.jsonl"), "metrics.jsonl: leads out"),
    "an environment that is a link": (replaced("environment.json"), "environment.json: leads out"),
    "a table that is a link": (replaced("reward_eval.json"), "reward_eval.json: leads out"),
    "broken metrics": (
        lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n\0\n[]\n{"loss": 1}\n'),
        "3 lines of it are damaged",
    ),
    "empty results": (
        lambda run: (run / "samples/final/results.json").write_text(""),
        "results.json: is not as prfl writes it",
    ),
    "results of another kind": (
        lambda run: (run / "samples/final/results.json").write_text('{"outcomes": [], "videos": 3}'),
        "results.json: is not as prfl writes it",
    ),
    "deep results": (
        lambda run: (run / "samples/final/results.json").write_text("[" * 100_000),
        "results.json: is not as prfl writes it",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_nothing_from_outside_is_shown(planted: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    plant, reason = PLANTED[planted]
    plant(run)
    page = write_report(run).read_text()
    assert SECRET not in page and "dGhlIHNlY3JldC" not in page  # as text, and in base64
    assert reason in page and reason in capsys.readouterr().out.replace("\n", "")
    assert "<h2>Left out</h2>" in page
    assert "<h2>Config</h2>" in page or "config" in planted, "the rest is there"


def test_a_page_has_a_size(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (run / "samples/final/videos/base-000.mp4").stat().st_size
    assert write_report(run).read_text().count("data:video/mp4") == 6
    monkeypatch.setattr(run_files, "VIDEOS", int(3.5 * size))
    page = write_samples_page(run / "samples/final/results.json", "samples").read_text()
    assert page.count("data:video/mp4") < 6 and "more than the" in page
