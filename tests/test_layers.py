"""Imports point one way.  The contract itself runs in test_gate.py; here, that it would catch what it is for."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def layers() -> list[str]:
    """Every module of the contract, from the top down."""
    contract = configparser.ConfigParser()
    contract.read(REPOSITORY / "setup.cfg")
    return contract["importlinter:contract:layers"]["layers"].replace("|", " ").split()


@pytest.mark.parametrize(
    ("module", "imports", "kept"),
    [
        ("prfl.cli", "prfl.factory", True),
        ("prfl.backbone", "prfl_kernels", True),
        ("prfl.reward", "prfl.data", True),
        ("prfl.rollout.solvers", "prfl.config", False),
        ("prfl.reward", "prfl.rollout", False),
        ("prfl.rollout", "prfl.reward", False),
        ("prfl.backbone", "prfl.data", False),
        ("prfl.objective", "prfl.training", False),
        ("prfl.objective", "prfl.steering", False),
        ("prfl_kernels", "prfl.utils.errors", False),
    ],
)
def test_the_contract_on_a_skeleton(tmp_path: Path, module: str, imports: str, kept: bool) -> None:
    named = re.findall(r"^ +(?:prfl[\w.]*)", (REPOSITORY / "setup.cfg").read_text(), re.M)  # by any contract
    for name in sorted({*layers(), *map(str.strip, named)}):
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(f"import {imports}\n" if name == module else "")
    (tmp_path / "prfl/__init__.py").touch()
    (tmp_path / "setup.cfg").write_text((REPOSITORY / "setup.cfg").read_text())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not the real packages
    code = "from importlinter.cli import lint_imports_command as run; run()"  # -c puts the current folder on the path
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode == 0) == kept, run.stdout + run.stderr


def test_every_part_of_the_package_has_its_layer() -> None:
    parts = {f"prfl.{path.stem}" for path in (REPOSITORY / "prfl").iterdir() if not path.name.startswith("_")}
    assert parts <= set(layers())


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without __init__.py is a namespace package: another one of the same name could shadow or join it."""
    for root in ("prfl", "kernels/prfl_kernels"):
        for path in (REPOSITORY / root).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_the_docs_draw_the_layers_that_are_checked() -> None:
    contract = configparser.ConfigParser()
    contract.read(REPOSITORY / "setup.cfg")
    lines = contract["importlinter:contract:layers"]["layers"].strip().splitlines()
    boxes = re.findall(r'^    (\w+)\["(.*?)<br>', (REPOSITORY / "docs/structure.md").read_text(), re.M)
    arrows = re.search(r"^    (cli --> .*)$", (REPOSITORY / "docs/structure.md").read_text(), re.M)
    assert arrows and arrows[1].split(" --> ") == [name for name, _ in boxes]
    assert [title for _, title in boxes] == [line.strip() for line in lines]


def test_shapes_are_checked_wherever_they_are_named() -> None:
    options = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    (option,) = [each for each in options if each.startswith("--jaxtyping-packages=")]
    *checked, checker = option.partition("=")[2].split(",")
    naming = [path for path in (REPOSITORY / "prfl").rglob("*.py") if "jaxtyping" in path.read_text()]
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in naming}
    assert set(checked) == modules and checker == "beartype.beartype"
