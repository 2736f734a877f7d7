"""What an adapter on some of the blocks costs in quality: the winning recipe of the shapes world, three seeds each.

    python bench/study_blocks.py [--out bench/results/blocks.json]

``configs/tiny/best.yaml`` (the reward inside the package, 1,000 network evaluations of a sample) with the adapter on
all six blocks, the last half, the last third and the first half.  Samples of the test prompts come from the same noise
as the base's and each other's, and the oracle says how many are right.  Runs that are there are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import studies
from bench import study_spine as spine
from bench.harness import study_tables

CONFIG = "configs/tiny/best.yaml"
RUNS = Path("runs/study-blocks")
BLOCKS = {"all blocks": "all", "last half": "last_half", "last third": "[4, 5]", "first half": "[0, 1, 2]"}


def run(name: str, seed: int) -> Path:
    overrides = [f"backbone.adapter.blocks={BLOCKS[name]}", f"seed={seed}", *spine.QUIET]
    return studies.train(RUNS / f"{spine.slug(name)}-{seed}", CONFIG, overrides)


def study() -> dict:
    keys = [(name, seed) for name in BLOCKS for seed in studies.SEEDS]
    with studies.pool() as pool:
        folders = dict(zip(keys, pool.map(lambda key: run(*key), keys), strict=True))
        rows = spine.tested(pool, folders, list(BLOCKS))
    return {"config": CONFIG, "blocks": BLOCKS, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/blocks.json"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    options = parser.parse_args()
    if options.table:
        print(study_tables.of_files("blocks", options.table))
        return
    result = study()
    studies.write(options.out, result)
    print(study_tables.of_files("blocks", options.out))


if __name__ == "__main__":
    main()
