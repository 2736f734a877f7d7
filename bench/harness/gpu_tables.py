"""Tables of what bench/ten_minutes.py brought home (bench/harness/bundle.py), for pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.bundle import STEP_MODES, case_rows

STEPS = {  # operation and provider: as a page names it
    (STEP_MODES, "full"): "latent reward",
    (STEP_MODES, "full, kernels"): "latent reward, kernels",
    ("same_step", "pixel, one latent frame"): "pixel reward, one latent frame",
}
PARTS = ("rollout", "reward", "decode", "backward")


def gpu_steps(lines: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[list[str]]]:
    """PRFL's step by each reward: seconds of its parts, and the allocator's peak beside the dry run's."""
    measured = {(info["operation"], info["provider"]): info for _, info in case_rows(lines)}
    body = []
    for key, name in STEPS.items():
        info = measured[key]
        seconds = [f"{info['parts_ms'][part] / 1e3:.2f}" for part in PARTS]
        peaks = [f"{info[which]['peak'] / 1e9:.1f}" for which in ("measured", "predicted")]
        body.append([name, f"{info['milliseconds']['median'] / 1e3:.2f}", *seconds, *peaks])
    return ["PRFL's step by a", "s", *PARTS, "peak, GB", "predicted"], body
