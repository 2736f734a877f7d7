"""Dry runs of the Wan configs as they ship, without their weights, from a bare clone."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl import cli

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def bare_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the configs: no runs, no data, no hub."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_prfl_on_14b_at_720p(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/wan2.1-14b/prfl.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate: 5.0e-06" in shown and "max_grad_norm: 1.0" in shown, "the resolved config"
    assert "75,600" in shown and "14,288,491,584 in 40 blocks" in shown and "104,857,600" in shown
    assert "8,000" in shown, "1,000 steps of 8 gradient forwards"
    assert "26.67 GiB" in shown, "14.3 billion weights, nearly all in bfloat16"
    assert "reward.path: there is no folder runs/wan2.1-14b-reward/reward" in shown
    assert "the first 8 of 40 blocks" in shown
    assert not Path("runs").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("config", ["wan2.1-1.3b/reward", "wan2.1-1.3b/vader"])
def test_the_others(config: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", f"configs/{config}.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "32,760" in shown and "1,418,996,800 in 30 blocks" in shown and "not here yet:" in shown


def test_a_later_stage_may_read_what_an_earlier_one_makes(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/tiny.yaml", "--dry-run"]) == 0
    assert "not here yet" not in capsys.readouterr().out
    assert cli.main(["train", "configs/tiny/prfl.yaml", "--dry-run"]) == 0
    assert "reward.path: there is no folder runs/tiny-reward/reward" in capsys.readouterr().out


def test_what_is_wrong_is_said_before_anything_is_built(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["train", "configs/wan2.1-14b/prfl.yaml", "--dry-run", "data.prompts.train=absent.txt"]) == 2
    assert "absent.txt" in capsys.readouterr().err
    assert cli.main(["train", "configs/wan2.1-14b/prfl.yaml", "--dry-run", "data.height=719"]) == 2
    assert "a height of 719 is not a multiple of 16" in capsys.readouterr().err
