"""What does a newcomer's first command gain?  Its policy trained with ten seeds, each on 192 test samples.

    python bench/study_first_run.py [--seeds 10] [--out bench/results/first_run.json]

A seed changes everything that is drawn: adapter, clips, prompts of each step, noise, and the test samples' noise.  The
first command trains a second head before, which only watches; here nothing watches, so it is left out.  Two runs at a
time, one thread each; a finished seed is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from bench import studies

RUNS = Path("runs/study-first-run")
CONFIG = "configs/tiny/policy.yaml"
UNWATCHED = ("evaluation.held_out_reward=null", "evaluation.every=96", "evaluation.final_samples=192")
AIM = 0.10
WATCHED = ("judge/all", *(f"judge/{name}" for name in studies.DIMENSIONS), "measured/size", "diversity")


def train(seed: int) -> Path:
    return studies.train(RUNS / str(seed), CONFIG, [*UNWATCHED, f"seed={seed}", f"evaluation.seed={seed}"])


def spread(seeds: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """Describe the differences of one measure over the seeds."""
    differences = [seed["measures"][name]["difference"]["value"] for seed in seeds.values()]
    return {
        "base": statistics.mean(seed["measures"][name]["base"] for seed in seeds.values()),
        "policy": statistics.mean(seed["measures"][name]["policy"] for seed in seeds.values()),
        "difference": statistics.mean(differences),
        "deviation": statistics.stdev(differences),
        "least": min(differences),
        "most": max(differences),
    }


def study(seeds: range) -> dict[str, Any]:
    with studies.pool() as pool:
        runs = {
            str(seed): studies.outcome(folder, WATCHED)
            for seed, folder in zip(seeds, pool.map(train, seeds), strict=True)
        }
    gains = [run["measures"]["judge/all"]["difference"]["value"] for run in runs.values()]
    return {
        "config": CONFIG,
        "overrides": list(UNWATCHED),
        "over the seeds": {name: spread(runs, name) for name in WATCHED},
        f"seeds that gain {AIM:.2f} or more": sum(gain >= AIM for gain in gains),
        "seeds": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="0 to this, less one; at least 2")
    parser.add_argument("--out", type=Path, default=Path("bench/results/first_run.json"))
    options = parser.parse_args()
    studies.write(options.out, study(range(options.seeds)))


if __name__ == "__main__":
    main()
