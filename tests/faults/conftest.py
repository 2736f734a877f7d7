"""The project that every fault is planted in: made once, copied for each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prfl import cli
from tests import pictures
from tests.faults.planting import Bench
from tests.faults.project import make_project
from tests.models import copies_in_place_of_loading


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """Clips, prompts, configs, two saved rewards and an SFT run with two checkpoints; copied for every fault."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pictures.leave_out(patch)
        make_project(tiny_pipeline_folder)
        assert cli.main(["train", "sft.yaml"]) == 0
    return folder


@pytest.fixture
def bench(template, tmp_path, tiny_pipeline_folder, monkeypatch, capsys, blank_pictures) -> Bench:
    folder = Path(shutil.copytree(template, tmp_path / "project"))
    monkeypatch.chdir(folder)
    copies_in_place_of_loading(tiny_pipeline_folder, monkeypatch)
    return Bench(monkeypatch, capsys, tiny_pipeline_folder, folder)
