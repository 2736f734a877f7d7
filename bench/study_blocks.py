"""What an adapter on some of the blocks costs in quality: the winning recipe of the shapes world, three seeds each.

    python bench/study_blocks.py [--out bench/results/blocks.json]

``configs/tiny/best.yaml`` (the reward inside the package, 1,000 network evaluations of a sample) with the adapter on
all six blocks, the last half, the last third and the first half.  Samples of the test prompts come from the same noise
as the base's and each other's, and the oracle says how many are right.  Runs that are there are not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench import studies
from bench import study_spine as spine

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


def table(result: dict) -> None:
    print("| adapter on | all right, of 768 | less all blocks' | by seed |\n| --- | --- | --- | --- |")
    for row in result["rows"]:
        more = row["right, less that of"].get("all blocks, guidance 1")
        less = f"{more['value']:+.3f} [{more['low']:+.3f}, {more['high']:+.3f}]" if more else ""
        seeds = ", ".join(f"{value:.3f}" for value in row["right per seed"])
        print(f"| {row['generator']} | {row['mean']['judge/all']['value']:.3f} | {less} | {seeds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/blocks.json"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    options = parser.parse_args()
    if options.table:
        table(json.loads(options.table.read_text(encoding="utf-8")))
        return
    result = study()
    studies.write(options.out, result)
    table(result)


if __name__ == "__main__":
    main()
