"""What pip installs, asked of the build backend: an editable install's lines on the path, and the wheel's files."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="the build backend: pip install -e '.[dev]' brings it")

REPOSITORY = Path(__file__).parents[1]
BUILD = "import sys; from hatchling import build; build.{}(sys.argv[1])"
OPEN = "import site; site.addsitedir({!r}); "  # reads .pth files, as Python does at its start
FIND = "from importlib.util import find_spec; print(*(find_spec(name).origin for name in ('prfl', 'prfl_kernels')))"


def python(code: str, folder: Path, *words: str) -> str:
    """Run code with the folder as the current one, which is the first entry of the path; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *words[:1], "-c", code, *words[1:]]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def site_packages(kind: str, folder: Path) -> Path:
    """Build a wheel (build_wheel or build_editable) of this repository and unpack it in the folder."""
    python(BUILD.format(kind), REPOSITORY, "-B", str(folder))
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_packages("build_wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return site_packages("build_editable", tmp_path_factory.mktemp("editable"))


@pytest.mark.parametrize("above_a_clone", [False, True])
def test_an_editable_install_imports_from_any_folder(editable: Path, tmp_path: Path, above_a_clone: bool) -> None:
    """Above a clone named prfl, too, whose folder would do as a namespace package.  -S: nothing else is installed."""
    (tmp_path / "folder" / ("prfl" if above_a_clone else "other")).mkdir(parents=True)
    files = python(OPEN.format(str(editable)) + FIND, tmp_path / "folder", "-S").split()
    assert files == [f"{REPOSITORY}/prfl/__init__.py", f"{REPOSITORY}/kernels/prfl_kernels/__init__.py"]
    assert not (editable / "prfl").exists(), "the configs are the clone's"


def test_a_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    for package, root in (("prfl", REPOSITORY), ("prfl_kernels", REPOSITORY / "kernels")):
        there = {path.relative_to(wheel) for path in (wheel / package).rglob("*") if path.is_file()}
        files = (path for path in (root / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        configs = (
            Path("prfl") / path.relative_to(REPOSITORY)
            for path in (REPOSITORY / "configs").rglob("*")
            if path.is_file()
        )
        assert there == {path.relative_to(root) for path in files} | (set(configs) if package == "prfl" else set())
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"prfl", "prfl_kernels"}


@pytest.mark.slow
def test_a_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The model, the reward and the configs of the moving shapes come with it."""
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import prfl.cli; print(prfl.__file__); prfl.cli.main()"
    printed = python(code, tmp_path, "-B", "train", "tiny/prfl.yaml", "--dry-run", "reward.path=shapes")
    assert printed.startswith(str(wheel)) and "steps" in printed
