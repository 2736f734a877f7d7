"""What cheaper rollouts cost in quality: the winning recipe of the shapes world with whole rollouts, a run a seed.

    python bench/study_rollout.py [--out bench/results/rollout.json] [--seeds 0 1 2] [--ways NAME ...]

``configs/tiny/best.yaml`` (the reward inside the package, 1,000 network evaluations of a sample) with the options of
``rollout.cheaper``, and a whole rollout for each gradient, where all evaluations but one or two are cheaper: as it is,
eight gradients share a coarse rollout, and all but a sixth of what is evaluated is trained or scored, and so exact.
Rounding is simulated on a CPU, so nothing is faster.  Samples of the test prompts come from the same noise as the
base's and each other's, and the oracle says how many are right.  Runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import studies
from bench import study_spine as spine
from bench.harness import study_tables
from prfl.config import load_config
from prfl.estimate import nfe
from prfl.factory.backbone import build_architecture

CONFIG = "configs/tiny/best.yaml"
RUNS = Path("runs/study-rollout")
# As bench/study_methods.py has it, of as many evaluations: a tenth of the steps is warm-up.
WHOLE = ["rollout.stride=1", "rollout.gradients_per_rollout=1", "training.steps=55", "training.warmup=6"]
FLOAT8, INT8 = "rollout.cheaper.products=float8", "rollout.cheaper.attention=int8"
WAYS = {
    "exact": [],
    "float8 products": [FLOAT8],
    "int8 attention": [INT8],
    "float8 and int8": [FLOAT8, INT8],
    "cache 0.075": ["rollout.cheaper.cache=0.075"],
    "cache 0.15": ["rollout.cheaper.cache=0.15"],
}


def run(name: str, seed: int) -> Path:
    return studies.train(
        RUNS / f"{spine.slug(name)}-{seed}", CONFIG, [*WHOLE, *WAYS[name], f"seed={seed}", *spine.QUIET]
    )


def cheaper_share(name: str) -> float:
    """Of the rollouts' evaluations: those that are not exact, by the plans of the run."""
    config = load_config(CONFIG, [*WHOLE, *WAYS[name], *spine.QUIET])
    counts = {each.name: each.total for each in nfe.count_nfe(config, build_architecture(config))}
    cheaper = counts.get(nfe.CHEAPER, 0)
    return cheaper / (cheaper + counts[nfe.ROLLOUT])


def cached_share(folder: Path) -> float:
    """Return the share of the rollouts' evaluations that the cache skipped, a mean over the rollouts."""
    return statistics.mean([record["rollout/cached"] for record in studies.records(folder, "rollout/cached")] or [0.0])


def study(ways: Sequence[str], seeds: Sequence[int]) -> dict:
    keys = [(name, seed) for seed in seeds for name in ways]
    with studies.pool() as pool:
        folders = dict(zip(keys, pool.map(lambda key: run(*key), keys), strict=True))
        rows = spine.tested(pool, folders, ways, seeds)
    shares = {
        name: {"cheaper": cheaper_share(name), "cached": [cached_share(folders[name, seed]) for seed in seeds]}
        for name in ways
    }
    return {
        "config": CONFIG,
        "overrides": {name: [*WHOLE, *way] for name, way in WAYS.items() if name in ways},
        "share of the rollouts' evaluations": shares,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/rollout.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(studies.SEEDS))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    options = parser.parse_args()
    if options.table:
        print(study_tables.of_files("rollout", options.table))
        return
    result = study(options.ways, options.seeds)
    studies.write(options.out, result)
    print(study_tables.of_files("rollout", options.out))


if __name__ == "__main__":
    main()
