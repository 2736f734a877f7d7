"""What a reader needs to weigh a result: command, machine, versions, commit, sources, weights; a device's peaks."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "liger-kernel")
MEASURED = ("kernels", "prfl", "bench")  # the sources that a result depends on


def facts(weights: str) -> dict[str, Any]:
    """Collect the facts beside a result, as JSON.  weights: which weights, and whether they are random."""
    return {
        "command": command(sys.argv),
        "machine": machine(),
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
        "sdpa": sdpa(),
        "commit": commit(),
        "sources": imported_sources(),
        "weights": weights,
    }


def command(words: Sequence[str]) -> str:
    """Write a command line without the folders of this machine.  words: as sys.argv."""
    first = Path(words[0])
    if first.name == "__main__.py":
        program = f"python -m {first.parent.name}"
    elif first.suffix == ".py":
        program = f"python {first}"
    else:
        program = first.name
    return " ".join([program, *words[1:]]).replace(f"{REPOSITORY}{os.sep}", "")


def machine() -> str:
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {device_name() or 'no GPU'}"


def device_name() -> str:
    """Return the name of the GPU that is used; empty without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def sdpa() -> dict[str, str]:
    """Say which of its kernels torch's attention takes here, for a video's tokens and, with a bias, for a text's.

    And cuDNN's version, by which it decides on Hopper: between cuDNN and FlashAttention 2 lies a factor of two.
    """
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    query = torch.zeros(1, 2, 1024, 128, device=device, dtype=dtype)
    backends = {"cudnn": str(torch.backends.cudnn.version())} if on_gpu else {}
    for name, keys, bias in (("video", 1024, None), ("text", 512, query[:, :1, :1, :1].expand(1, 1, 1, 512))):
        key = query[:, :, :keys]
        backend = SDPBackend(torch._fused_sdp_choice(query, key, key, bias))
        backends[name] = backend.name.removesuffix("_ATTENTION").lower()
    return backends


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """Return the short hash of the working tree's commit, with "+" where a source was changed since.

    Without git, as where only the files were copied to, the variable PRFL_COMMIT, or "unknown".
    """
    if named_commit := os.environ.get("PRFL_COMMIT"):
        return named_commit
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", *MEASURED, ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True)
    return done.stdout.strip()


def sources(parts: Sequence[str] = MEASURED) -> str:
    """Hash Python files of the repository, and those below folders: what a result was measured of."""
    files: list[Path] = []
    for root in (REPOSITORY / part for part in parts):
        files += [root] if root.is_file() else root.rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(REPOSITORY)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def imported_sources() -> str:
    """Hash the measured sources once: a process runs what it has imported, whatever changes on the disk later."""
    return sources()


class Peak(NamedTuple):
    """What a device can do at most, from its maker's data sheet: dense tensor cores, no sparsity."""

    half_tflops: float  # bfloat16 and float16
    single_tflops: float  # float32 without TF32
    tb_per_s: float


PEAKS = {  # the first whose name is in the device's counts
    "B200": Peak(2250, 80, 8.0),
    "H200": Peak(989, 67, 4.8),
    "H100 PCIe": Peak(756, 51, 2.0),
    "H100 NVL": Peak(835, 60, 3.9),
    "H100": Peak(989, 67, 3.35),
    "A100-SXM4-80GB": Peak(312, 19.5, 2.039),
    "A100 80GB PCIe": Peak(312, 19.5, 1.935),
    "A100": Peak(312, 19.5, 1.555),
    "L40S": Peak(362, 91.6, 0.864),
    "RTX 4090": Peak(165, 82.6, 1.008),
}


def roofline(seconds: float, flops: float, moved: float, dtype: torch.dtype, device: str) -> float | None:
    """Return the share of the roofline: the least time that the device's peaks allow over the measured one.

    flops, moved: operations and bytes that the work cannot do without.  device: its name.
    None for a device that is not in ``PEAKS``, and for a type whose peak is not there.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    if peak is None or dtype not in (torch.bfloat16, torch.float16, torch.float32) or not (flops or moved):
        return None
    tflops = peak.single_tflops if dtype == torch.float32 else peak.half_tflops
    return max(flops / (tflops * 1e12), moved / (peak.tb_per_s * 1e12)) / seconds
