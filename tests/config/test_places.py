"""Files that a config names lie beside it, or where the command is given; configs of prfl's own are found anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from prfl import cli
from prfl.config import load_config, load_stages
from prfl.config.places import READ_KEYS, find_config, shipped_configs
from prfl.utils.errors import PrflError

OWN = shipped_configs()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in project/configs with prompts and a manifest beside it; the command is given in project."""
    folder = tmp_path / "project" / "configs"
    folder.mkdir(parents=True)
    keys = yaml.safe_load((OWN / "tiny/reward.yaml").read_text())
    keys["data"] |= {"manifest": "clips.jsonl", "prompts": {"train": "../train.txt", "validation": "shapes"}}
    del keys["data"]["generator"]
    (folder / "own.yaml").write_text(yaml.safe_dump(keys))
    (folder / "clips.jsonl").write_text("{}\n")
    (tmp_path / "project" / "train.txt").write_text("a circle\n")
    monkeypatch.chdir(tmp_path / "project")
    return folder


def test_a_file_beside_the_config_is_found_and_the_current_folder_goes_first(project: Path) -> None:
    data = load_config("configs/own.yaml").data
    assert (data.manifest, data.prompts.train) == (Path("configs/clips.jsonl"), "train.txt")
    assert data.prompts.validation == "shapes" and data.cache == Path("runs/cache"), "what is written is not sought"
    Path("clips.jsonl").write_text("{}\n")
    assert load_config("configs/own.yaml").data.manifest == Path("clips.jsonl")


def test_on_the_command_line_a_file_is_the_current_folders(project: Path) -> None:
    assert load_config("configs/own.yaml", ["data.manifest=clips.jsonl"]).data.manifest == Path("clips.jsonl")


def test_a_run_folder_of_an_earlier_stage_is_never_sought_beside_the_config(project: Path) -> None:
    (project / "runs/tiny-reward/reward").mkdir(parents=True)
    for name in ("reward", "prfl"):
        (project / f"{name}.yaml").write_text((OWN / f"tiny/{name}.yaml").read_text())
    reward = load_config("configs/prfl.yaml").reward
    assert reward is not None and list(reward.paths) == ["runs/tiny-reward/reward"]


def test_an_error_names_the_key_and_both_places(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project.parent / "train.txt").unlink()
    assert cli.main(["train", "configs/own.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prfl: configs/own.yaml: data.prompts.train: there is no such file")
    assert ": ../train.txt, nor train.txt\n" in said


def test_what_a_dry_run_lacks_has_both_places(project: Path, capsys: pytest.CaptureFixture) -> None:
    from prfl.estimate.missing_inputs import missing_inputs

    (project / "clips.jsonl").unlink()
    config = load_config("configs/own.yaml")
    (line,) = missing_inputs(config, file=Path("configs/own.yaml"))
    assert line.startswith("data.manifest: there is no file clips.jsonl;") and "(nor is it configs/clips.jsonl)" in line


def test_every_key_that_is_read_is_sought() -> None:
    assert len(READ_KEYS) >= 11 and {"reward.path", "data.manifest", "backbone.model"} <= READ_KEYS
    assert not {"run", "data.cache"} & READ_KEYS


@pytest.mark.parametrize("name", ["tiny.yaml", "configs/tiny.yaml"])
def test_a_config_of_prfl_is_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [stage.path.parent for stage in load_stages(name)] == [OWN / "tiny"] * 2
    prompts = load_config("wan2.1-14b/prfl.yaml").data.prompts
    assert Path(prompts.train) == OWN / "prompts/videos.txt" and Path(prompts.train).is_file()

    monkeypatch.setattr("prfl.commands.train.run", lambda options: None)
    assert cli.main(["train", name]) == 0
    assert f"{name} is not here; taken is the one that comes with prfl: {OWN / 'tiny.yaml'}" in capsys.readouterr().err
    Path("tiny.yaml").write_text("")
    assert find_config("tiny.yaml") == Path("tiny.yaml"), "the user's own goes first"


def test_a_config_that_is_nowhere_names_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrflError, match="did you mean prfl's own tiny/vader.yaml") as caught:
        find_config("tiny/vadr.yaml")
    assert "as tiny.yaml, videos.yaml, " in caught.value.fix and str(OWN) in caught.value.fix
    for outside in ("../tiny.yaml", str(tmp_path / "tiny.yaml")):
        with pytest.raises(PrflError):
            find_config(outside)
