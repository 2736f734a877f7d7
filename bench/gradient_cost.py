"""GPU-seconds of one gradient of a 480p video by plan: how the rollout is shared out decides more than any kernel.

    python bench/gradient_cost.py [--measured BUNDLE] [--out bench/results/gradient_cost.json]

A gradient is what one video adds to one optimizer step of PRFL: its share of the rollout, the walked edge (forward,
checkpointed blocks again, backward), the reward's forward and backward, the distance now and then.  How many network
evaluations that is, is counted from the plans of the config's own run (``prfl train --dry-run``); what an evaluation
takes is calculated from bench/results/step.json, or measured where BUNDLE, of bench/ten_minutes.py, is given.  What
``rollout.cheaper`` would save is always calculated (``CHEAPER``).
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from bench import studies
from bench.harness import study_tables
from bench.harness.bundle import Seconds, call_seconds
from bench.step_counts import FORWARD, GBS, PRODUCT
from prfl.backbone import Backbone
from prfl.backbone.wan.text import TEXT_TOKENS
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate import nfe as forecast
from prfl.estimate.parts import Shapes
from prfl.factory.backbone import build_architecture

MODELS = {"1.3B 480p": ("configs/wan2.1-1.3b", "wan-1.3b"), "14B 480p": ("configs/wan2.1-14b", "wan-14b")}
SIZE = ("data.height=480", "data.width=832", "data.frames=81", "evaluation.every=0")
RESULTS = Path(__file__).parent / "results"
REWARD = 1 / 5  # of the blocks, as the Wan worlds' reward.yaml have it: 6 of 30, 8 of 40
STRIDES, SHARED = (1, 2, 4, 8), (1, 2, 4, 8)
# Assumed: float8 products at twice the rate of bfloat16's.  Attention in 8 bits at 900 TFLOPS, 1.5 times bfloat16's:
# SageAttention 2 (arXiv 2411.10958) says that it matches FlashAttention 3 in FP8 on Hopper, whose authors have "close
# to 1.2 PFLOPS" (arXiv 2407.08608), before q, k and v are rounded.
FASTER_PRODUCTS, FASTER_ATTENTION = 2.0, 1.5
QUANTISED = 5  # bytes of traffic a rounded number: read twice, written once (prfl/backbone/eight_bits.py)
FLOAT8, INT8, CACHE = "products: float8", "attention: int8", "cache: 0.15"
CHEAPER = {  # a row of bench/results/rollout.json says what share the cache skips
    "exact": (),
    "float8 products": (FLOAT8,),
    "int8 attention": (INT8,),
    "float8 and int8": (FLOAT8, INT8),
    "cache 0.15": (CACHE,),
    "float8, int8, cache 0.15": (FLOAT8, INT8, CACHE),
}
WHOLE = "whole rollouts"
PLANS = {WHOLE: (1, 1), "stride 2": (2, 1), "stride 2, 4 gradients": (2, 4), "stride 4, 8 gradients": (4, 8)}


def calculated(model: str, kernels: bool) -> Seconds:
    calls = json.loads((RESULTS / "step.json").read_text(encoding="utf-8"))["calls"]
    kind = "kernels" if kernels else "torch"
    totals = [
        sum(work["ms at the roofline"] for work in calls[f"{model}, {call}, {kind}"].values()) / 1e3
        for call in ("rollout", "gradient")
    ]
    return Seconds(*totals)


def config_of(folder: str, *plan: str) -> Config:
    return load_config(f"{folder}/prfl.yaml", [*SIZE, *plan, "backbone.device=cuda"])


@cache
def architecture(folder: str) -> Backbone:
    """The model, of which no plan changes anything."""
    return build_architecture(config_of(folder))


def cheaper_forward(name: str, how: tuple[str, ...], cached: float) -> float:
    """Calculate the seconds of a rollout's call with kernels.  cached: the share of calls that the cache skips."""
    work = json.loads((RESULTS / "step.json").read_text(encoding="utf-8"))["calls"][f"{name}, rollout, kernels"]
    seconds = {kind: amounts["ms at the roofline"] / 1e3 for kind, amounts in work.items()}
    folder = MODELS[name][0]
    if FLOAT8 in how:
        seconds[PRODUCT] /= FASTER_PRODUCTS
        seconds["rounding"] = QUANTISED * rounded_numbers(config_of(folder), architecture(folder)) / 1e9 / GBS
    if INT8 in how:
        seconds[FORWARD] /= FASTER_ATTENTION
    skipped = (
        cached * (1 - 1 / architecture(folder).facts.num_blocks) if CACHE in how else 0.0
    )  # the first block always runs
    return (1 - skipped) * sum(seconds.values())


def rounded_numbers(config: Config, model: Backbone) -> int:
    """Count the weights and inputs of the blocks' linear layers in one call on a video."""
    tokens = model.facts.tokens(Shapes(model, config).latent)
    count = 0
    for name, layer in model.networks["transformer"].get_submodule("blocks").named_modules():
        if type(layer) is nn.Linear:
            of_text = "attn2.to_k" in name or "attn2.to_v" in name
            count += layer.weight.numel() + (TEXT_TOKENS if of_text else tokens) * layer.in_features
    return count


def cached_share() -> float:
    """Return the share of the cheaper evaluations that the cache skipped in the study of the shapes world."""
    shares = json.loads((RESULTS / "rollout.json").read_text(encoding="utf-8"))["share of the rollouts' evaluations"]
    of_all = shares["cache 0.15"]
    return statistics.mean(of_all["cached"]) / of_all["cheaper"]


def cheaper_table(name: str, seconds: Seconds) -> dict[str, dict[str, float]]:
    """Tabulate GPU-seconds of a gradient by plan, for each way of ``CHEAPER``; a cache's for the plan of its share."""
    share, folder = cached_share(), MODELS[name][0]
    table = {}
    for way, how in CHEAPER.items():
        call = None if way == "exact" else cheaper_forward(name, how, share)
        plans = {WHOLE: PLANS[WHOLE]} if CACHE in how else PLANS
        costs = {plan: cost(folder, *rollout, seconds, call) for plan, rollout in plans.items()}
        table[way] = {"seconds of a cheaper call": call or seconds.forward, **costs}
    return table


def cost(folder: str, stride: int, gradients: int, seconds: Seconds, cheaper: float | None = None) -> float:
    """Calculate the GPU-seconds of a gradient in a run of the folder's prfl.yaml with this rollout.

    cheaper: the seconds of a cheaper call.
    """
    plan = [f"rollout.stride={stride}", f"rollout.gradients_per_rollout={gradients}"]
    plan += [] if cheaper is None else ["rollout.cheaper.products=float8"]  # whichever: they are counted apart
    config = config_of(folder, *plan)
    counts = {each.name: each.total for each in forecast.count_nfe(config, architecture(folder))}
    price = {
        forecast.ROLLOUT: seconds.forward,
        forecast.CHEAPER: cheaper or 0.0,
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
    result: dict[str, Any] = {"how": f"evaluations counted from the plans of prfl.yaml; {how}", "tables": tables}
    if not options.measured:
        result["cheaper rollouts"] = {name: cheaper_table(name, calculated(name, kernels=True)) for name in MODELS}
    studies.write(options.out, result, weights=studies.COUNTED)

    for name in ("gradient", "cheaper") if "cheaper rollouts" in result else ("gradient",):
        print(study_tables.of_files(name, options.out))


if __name__ == "__main__":
    main()
