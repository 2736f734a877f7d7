"""GPU-seconds of one gradient of a 480p video by plan: how the rollout is shared out decides more than any kernel.

    python bench/gradient_cost.py [--measured BUNDLE] [--out bench/results/gradient_cost.json]

A gradient is what one video adds to one optimizer step of PRFL: its share of the rollout, the walked edge (forward,
checkpointed blocks again, backward), the reward's forward and backward, the distance now and then.  How many network
evaluations that is, is counted from the plans of the config's own run (``prfl train --dry-run``); what an evaluation
takes is calculated from bench/results/step.json, or measured where BUNDLE, of bench/ten_minutes.py, is given.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import studies
from bench.harness.bundle import Seconds, call_seconds
from prfl.config import load_config
from prfl.estimate import nfe as forecast
from prfl.factory.backbone import build_architecture

MODELS = {"1.3B 480p": ("configs/wan2.1-1.3b", "wan-1.3b"), "14B 480p": ("configs/wan2.1-14b", "wan-14b")}
SIZE = ("data.height=480", "data.width=832", "data.frames=81", "evaluation.every=0")
RESULTS = Path(__file__).parent / "results"
REWARD = 1 / 5  # of the blocks, as the Wan worlds' reward.yaml have it: 6 of 30, 8 of 40
STRIDES, SHARED = (1, 2, 4, 8), (1, 2, 4, 8)


def calculated(model: str, kernels: bool) -> Seconds:
    calls = json.loads((RESULTS / "step.json").read_text(encoding="utf-8"))["calls"]
    kind = "kernels" if kernels else "torch"
    totals = [
        sum(work["ms at the roofline"] for work in calls[f"{model}, {call}, {kind}"].values()) / 1e3
        for call in ("rollout", "gradient")
    ]
    return Seconds(*totals)


def cost(folder: str, stride: int, gradients: int, seconds: Seconds) -> float:
    """GPU-seconds of a gradient in a run of the folder's prfl.yaml with this rollout."""
    plan = f"rollout.stride={stride}", f"rollout.gradients_per_rollout={gradients}"
    config = load_config(f"{folder}/prfl.yaml", [*SIZE, *plan, "backbone.device=cuda"])
    model = build_architecture(config)
    counts = {each.name: each.total for each in forecast.count_work(config, model)}
    price = {
        forecast.ROLLOUT: seconds.forward,
        forecast.UNGUIDED: seconds.forward,
        forecast.DISTANCE: seconds.forward,
        forecast.GRADIENT: seconds.gradient,
        forecast.REWARD: seconds.gradient * REWARD,  # its blocks are checkpointed, too
    }
    spent = sum(counts.get(name, 0) * each for name, each in price.items())
    return spent / counts[forecast.GRADIENT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, metavar="BUNDLE", help="take an evaluation's seconds from there")
    parser.add_argument("--out", type=Path, default=RESULTS / "gradient_cost.json")
    options = parser.parse_args()
    tables = {}
    for model, (folder, world) in MODELS.items():
        for kernels in (False, True):
            mode = "full, kernels" if kernels else "full"
            seconds = call_seconds(options.measured, world, mode) if options.measured else calculated(model, kernels)
            plans = {
                f"stride {stride}, {gradients} gradients a rollout": cost(folder, stride, gradients, seconds)
                for stride in STRIDES
                for gradients in SHARED
            }
            tables[f"{model}, {mode}"] = {"seconds of a call": seconds._asdict(), "GPU-seconds of a gradient": plans}
    how = f"calls measured: {options.measured}" if options.measured else "calculated from bench/results/step.json"
    result = {"how": f"evaluations counted from the plans of prfl.yaml; {how}", "tables": tables}
    studies.write(options.out, result, weights=studies.COUNTED)
    for name, table in tables.items():
        print(table_of(name, table["GPU-seconds of a gradient"]))


def table_of(name: str, plans: dict[str, float]) -> str:
    lines = [f"| {name}; gradients a rollout | " + " | ".join(f"stride {stride}" for stride in STRIDES) + " |"]
    lines.append("| --- |" + " --- |" * len(STRIDES))
    for gradients in SHARED:
        cells = [f"{plans[f'stride {stride}, {gradients} gradients a rollout']:.1f}" for stride in STRIDES]
        lines.append(f"| {gradients} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
