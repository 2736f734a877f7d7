"""Records which operations' compiled kernels have passed their tests on this machine: a stamp that the tests leave.

In $XDG_CACHE_HOME/prfl_kernels/passed.json (~/.cache by default), by GPU, driver, torch, triton and the sources' hash:
after any of them changes the tests have to pass again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def stamp_file() -> Path:
    """Return the stamp's path, whether it is there or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prfl_kernels/passed.json"


def machine(device: torch.device | str = "cuda") -> str:
    """Name all that the compiled kernels depend on; empty without a GPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return ""

    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"

    name = torch.cuda.get_device_name(device)
    return f"{name}, driver {_driver()}, torch {torch.__version__}, triton {triton}, sources {digest.hexdigest()[:12]}"


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:  # hidden by a container: the newest CUDA that it can run
        return str(torch._C._cuda_getDriverVersion())


def passed(device: torch.device | str = "cuda") -> frozenset[str]:
    """Return the operations whose tests have passed here; none where there is no GPU or no stamp."""
    key = machine(device)
    if not key:
        return frozenset()
    return frozenset(operation for operation, held in _read().get(key, {}).items() if held)


def record(results: Mapping[str, bool], device: torch.device | str = "cuda") -> Path:
    """Write whether each operation's tests passed, beside the results of others and of other machines."""
    path, stamps = stamp_file(), _read()
    stamps[machine(device)] = stamps.get(machine(device), {}) | dict(results)
    path.parent.mkdir(parents=True, exist_ok=True)

    partial = path.with_suffix(f".{os.getpid()}")  # replaced at once: another process may read meanwhile
    partial.write_text(json.dumps(stamps, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _read() -> dict[str, dict[str, bool]]:
    """Read the stamps by machine; none where the file is absent or damaged."""
    try:
        stamps = json.loads(stamp_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}
