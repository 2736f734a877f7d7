"""Would attention in 8 bits do for a rollout?  Its effect on samples of the shapes world, with the rounding simulated.

    python bench/study_reward.py        first: it trains the reward
    python bench/low_precision_rollout.py [--out bench/results/low_precision_rollout.json]

Queries, keys and values of self-attention are rounded to 8 bits, as kernels that multiply in 8 bits read them (one
scale a token and head; int8 for q and k, float8 e4m3 for v or for all), and the samples of the base from the same noise
are scored by the oracle and by the latent reward.  Nothing is faster by it here.  int8 queries and keys with float8
values are what ``rollout.cheaper.attention: int8`` takes; bench/study_rollout.py has what it costs a training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import studies
from bench import study_spine as spine
from prfl.backbone import eight_bits
from prfl.backbone.cheaper import EXACT, Cheaper
from prfl.backbone.eight_bits import float8, int8
from prfl.backbone.kernels import cheaper_calls
from prfl.config import load_config
from prfl.evaluation.metrics import difference_interval, mean_interval
from prfl.factory.backbone import build_backbone
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_reward
from prfl.runs import outcomes

SAMPLES = 8  # of each of 24 validation prompts
Rounding = Callable[[Tensor], Tensor]
ROUNDINGS: dict[str, tuple[Rounding, Rounding] | None] = {  # of queries and keys, and of values
    "exact": None,
    "int8 queries and keys": (int8, lambda v: v),
    "int8 queries and keys, float8 values": (int8, float8),
    "float8 queries, keys and values": (float8, float8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/low_precision_rollout.json"))
    options = parser.parse_args()
    config = load_config("configs/tiny/prfl.yaml", ["evaluation.steps=20", "evaluation.judge=shapes"])
    model = build_backbone(config)
    head = spine.REWARDS / "adapter-0/reward"
    reward = {"reward": build_latents_scorer(load_reward(head, model, "rollout"), model)}

    prompts, rows, scores = load_prompts(config.data)["validation"], {}, {}
    for name, rounding in ROUNDINGS.items():
        if rounding:
            eight_bits.QUERIES_AND_KEYS, eight_bits.VALUES = rounding
        how = Cheaper(attention="int8") if rounding else EXACT
        with torch.no_grad(), cheaper_calls(model, how).at(0):
            outcome = outcomes.outcome_of(config, model, reward, prompts, SAMPLES, "base")
        total = torch.stack([outcome.scores[f"reward/{each}"] for each in studies.DIMENSIONS]).mean(0)
        scores[name] = {"everything right": outcome.scores["judge/all"], "trained reward": total}
        rows[name] = {
            key: {
                "mean": vars(mean_interval(value, outcome.prompts)),
                "less exact": vars(difference_interval(value, scores["exact"][key], outcome.prompts)),
                "mean absolute change": (value - scores["exact"][key]).abs().mean().item(),
            }
            for key, value in scores[name].items()
        }
        print(name, {key: round(row["mean"]["value"], 4) for key, row in rows[name].items()}, flush=True)
    studies.write(options.out, {"samples": len(prompts) * SAMPLES, "rows": rows})


if __name__ == "__main__":
    main()
