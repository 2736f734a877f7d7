"""The machine's own ways: a terminal that knows only ASCII, names beyond it, accelerate's settings, options."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.training.distributed import make_accelerator
from prfl.training.run_folder import RunFolder
from tests.faults.conftest import bench as bench  # fixtures
from tests.faults.conftest import template as template
from tests.faults.planting import Bench


def test_names_beyond_ascii_on_an_ascii_terminal(bench: Bench) -> None:
    run, terminal = Path("runs/кино"), io.BytesIO()
    for name in ("stdout", "stderr"):
        bench.patch.setattr(sys, name, io.TextIOWrapper(terminal, "ascii", "strict", write_through=True))
    Path("train.txt").write_text("ein grüner Würfel\n", encoding="utf-8")
    assert cli.main(["train", "sft.yaml", "training.steps=1", f"run={run}"]) == 0
    assert "runs/кино" in (run / "config.yaml").read_text(encoding="utf-8")
    assert cli.main(["train", "sft.yaml", f"run={run}", "seed=3"]) == 2
    for command in (["sample", "нет.yaml"], ["eval", "--run", "нет"], ["train", "sft.yaml", "--dry-run", f"run={run}"]):
        assert cli.main(command) == (0 if "--dry-run" in command else 2)
    shown = terminal.getvalue().decode("ascii")
    assert "runs/\\u043a\\u0438\\u043d\\u043e" in shown and "Traceback" not in shown


def test_a_name_that_the_file_system_cannot_write(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        "кино".encode("latin-1")

    monkeypatch.setattr("prfl.commands.train.load_stages", refuses)
    assert cli.main(["train", "sft.yaml"]) == 2
    printed = capsys.readouterr().err
    assert "кино: the locale's encoding, latin-1, cannot write this name" in printed and "PYTHONUTF8=1" in printed


def test_accelerates_precision_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # accelerate keeps one for a process
    assert make_accelerator(RunFolder(tmp_path), device, trackers=[]).mixed_precision == "no"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["labels", "import", "a.csv", "--scale", "1-5"], "'1-5' is no LOW:HIGH, as 1:5"),
        (["score", "a.mp4", "--head", "h", "--sigmas", "0;1"], "'0;1' is no list of numbers, as 0,0.5,0.9"),
    ],
)
def test_options_are_refused_in_words(arguments: list[str], words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert words in capsys.readouterr().err
