"""Would attention in 8 bits do for a rollout?  Its effect on samples of the shapes world, with the rounding simulated.

    python bench/study_reward.py        first: it trains the reward
    python bench/low_precision_rollout.py [--out bench/results/low_precision_rollout.json]

Queries, keys and values of self-attention are rounded to 8 bits, as kernels that multiply in 8 bits read them (one
scale a token and head; int8 for q and k, float8 e4m3 for v or for all), and the samples of the base from the same noise
are scored by the oracle and by the latent reward.  Nothing is faster by it here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import studies
from bench import study_spine as spine
from prfl.backbone.wan import kernels
from prfl.config import load_config
from prfl.evaluation.metrics import difference_interval, mean_interval
from prfl.factory.backbone import build_backbone
from prfl.factory.data import load_prompts
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.reward import load_reward
from prfl.runs import outcomes

SAMPLES = 8  # of each of 24 validation prompts
EXACT = kernels.attend


def int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return (x / scale).round() * scale


def float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def rounded(of_queries_and_keys: Callable[[Tensor], Tensor], of_values: Callable[[Tensor], Tensor]) -> Callable:
    def attend(backend: str, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        if query.shape[1] != key.shape[1]:  # the text's keys and values are few: they stay as they are
            return EXACT(backend, query, key, value, bias)
        return EXACT(backend, of_queries_and_keys(query), of_queries_and_keys(key), of_values(value), bias)

    return attend


ROUNDINGS = {
    "exact": EXACT,
    "int8 queries and keys": rounded(int8, lambda v: v),
    "int8 queries and keys, float8 values": rounded(int8, float8),
    "float8 queries, keys and values": rounded(float8, float8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/low_precision_rollout.json"))
    options = parser.parse_args()
    config = load_config("configs/tiny/prfl.yaml", ["evaluation.steps=20", "evaluation.judge=shapes"])
    model = build_backbone(config)
    model.use_kernels((), "triton")  # our processors, whose attention can be replaced; on a CPU its torch path
    head = spine.REWARDS / "adapter-0/reward"
    reward = {"reward": build_latents_scorer(load_reward(head, model, "rollout"), model)}
    prompts, rows, scores = load_prompts(config.data.prompts)["validation"], {}, {}
    for name, attend in ROUNDINGS.items():
        kernels.attend = attend
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
