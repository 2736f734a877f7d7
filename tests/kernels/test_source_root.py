"""kernels/ is a source root, not a package: nothing here may pass for Hugging Face's package of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(code: str, *paths: Path) -> str:
    """What code prints in a fresh interpreter with these folders first on its path."""
    prelude = f"import sys; sys.path[:0] = {[str(path) for path in paths]!r}\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_here_is_an_importable_kernels() -> None:
    """With the root on the path the folder is at most a namespace, which has no file and no version."""
    assert not (REPOSITORY / "kernels/__init__.py").exists()
    code = """
import importlib.metadata, importlib.util
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin)
try: print(importlib.metadata.version("kernels"))
except importlib.metadata.PackageNotFoundError: print("no version")
"""
    origin, version = run(code, REPOSITORY).splitlines()
    assert not origin.startswith(str(REPOSITORY))
    assert (origin in ("True", "None")) == (version == "no version")


def test_a_real_package_of_that_name_wins_from_the_end_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("real = True")
    code = f"sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.real)"
    assert run(code, REPOSITORY, REPOSITORY / "kernels") == "True"


def test_prfl_kernels_does_not_need_triton_or_prfl() -> None:
    code = "sys.modules['triton'] = None; import prfl_kernels; print('prfl' in sys.modules, 'diffusers' in sys.modules)"
    assert run(code, REPOSITORY / "kernels") == "False False"
