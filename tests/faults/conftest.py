"""The project that every fault is planted in: made once, copied for each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from prfl import cli
from tests.faults.planting import Bench
from tests.faults.project import make_project


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_folder: Path) -> Path:
    """Clips, prompts, configs, two saved rewards and an SFT run with two checkpoints; copied for every fault."""
    folder = tmp_path_factory.mktemp("faults") / "project"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    try:
        make_project(tiny_pipeline_folder)
        assert cli.main(["train", "sft.yaml"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def bench(template, tmp_path, tiny_pipeline_folder, monkeypatch, capsys) -> Bench:
    folder = Path(shutil.copytree(template, tmp_path / "project"))
    monkeypatch.chdir(folder)
    return Bench(monkeypatch, capsys, tiny_pipeline_folder, folder)
