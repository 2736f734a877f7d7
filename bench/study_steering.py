"""Choosing and steering on the shapes world: how many samples are right, and at how many calls.

    python bench/study_steering.py --policy runs/tiny-best                  hours on two cores
    python bench/study_steering.py --rows base "best of 8, at 0.5" --prompts 16 --chunks 1 --seeds 0 --guidance 1
    python bench/study_steering.py --policy runs/tiny-best --there          only what was drawn, into the results

Every row is a method with a reward: the head inside the package, a pixel reward trained on the same labels (at clean
predictions, at the calls of the head's row, decodes among them), chance, and the oracle itself, the ceiling.  The
generators are the base and, with --policy RUN, a run's policy.

1. Of each generator, guidance and seed a pool of chains is drawn, 8 of each prompt at a time (--chunks), and looked at
   on their way.  Rows that only choose among chains without noise are played back from it (bench/steering_pool.py).
2. The other rows are drawn each by itself, of the base without guidance (--samples of each prompt and seed).

What is there is not drawn again, so a stopped study goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from bench import steering_pool, studies
from bench.harness import study_tables
from bench.steering_rows import CONFIG, END, PIXEL, PLAIN, ROWS, STEPS, Row, World, a_world, cost_of, method_of, prices
from bench.study_spine import slug
from prfl.evaluation import metrics, plots
from prfl.factory.prompts import load_prompts
from prfl.reward.pixel import PixelReward
from prfl.rollout.sampling import decode_all, jobs
from prfl.steering.best_of import BestOf
from prfl.steering.calls import Calls
from prfl.steering.sampling import steer
from prfl.toy import clips as shapes
from prfl.utils.files import atomic_write

RUNS = Path("runs/study-steering")
SAMPLES = 8


# --------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Cell:
    """A generator at a guidance and a seed: where its files are."""

    policy: Path | None
    guidance: float
    seed: int
    prompts: int

    @property
    def folder(self) -> Path:
        who = "base" if self.policy is None else "policy"
        return RUNS / f"{who}-{self.guidance:g}-{self.seed}-{self.prompts}"

    def chunk(self, number: int) -> Path:
        return self.folder / f"chains-{number}.safetensors"

    def row(self, name: str, samples: int) -> Path:
        return self.folder / f"{slug(name)}-{samples}.json"

    @property
    def tested(self) -> list[str]:
        return load_prompts(a_world().config.data)["test"][: self.prompts]

    def pool(self) -> steering_pool.Pool | None:
        """The chunks that are there; None without any."""
        paths = [self.chunk(number) for number in range(SAMPLES)]
        there = [path for path in paths if path.exists()]
        if not there:
            return None
        assert there == paths[: len(there)], f"{self.folder}: a chunk is missing between others"
        pixel = PixelReward.from_pretrained(PIXEL) if PIXEL.exists() else None
        return steering_pool.load_pool(there, self.tested, STEPS, self.seed, a_world().model, pixel)


def draw_pool(cell: Cell, chunks: Sequence[int]) -> None:
    missing = [number for number in chunks if not cell.chunk(number).exists()]
    world = World(cell.policy, cell.guidance, cell.seed) if missing else None
    for number in missing:
        assert world is not None
        steering_pool.draw_chunk(cell.chunk(number), world.begin, world.model, cell.tested, number)
        print(cell.chunk(number), flush=True)


def draw_row(cell: Cell, name: str, samples: int) -> None:
    """One row by itself: the oracle's verdict on every sample, and what one has cost."""
    out = cell.row(name, samples)
    if out.exists():
        return
    world, row = World(cell.policy, cell.guidance, cell.seed), ROWS[name]
    method, _ = method_of(name, cell.guidance)
    every, indices = jobs(cell.tested, samples)
    latents, calls = [], Calls()
    for _, steered in steer(
        world.model, every, indices, method, replace(world.settings, batch=64), world.schedule(row.solver),
        [world.look(row.reward)], adapter=world.adapter, decode_price=world.prices.decode,
    ):  # fmt: skip
        latents.append(steered.kept.latents.float().cpu())
        calls += steered.calls
    pixels = decode_all(world.model, torch.cat(latents))
    scores = {key: values.tolist() for key, values in shapes.judge(pixels, every).items()}
    spread = metrics.diversity(pixels, every)
    result = {"scores": scores, "calls": asdict(calls / len(every)), "spread": spread}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    print(f"{out}: {statistics.mean(scores['all']):.3f}, {sum(result['calls'].values()):.1f} calls", flush=True)


# ------------------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True)
class Outcome:
    """A row at one cell.  right, size: (prompts, samples).  spread: by prompt."""

    right: Tensor
    size: Tensor
    spread: dict[str, float]
    calls: Calls


def outcome_of(cell: Cell, pool: steering_pool.Pool | None, name: str, samples: int) -> Outcome | None:
    """What is there of a row; None where it was not drawn."""
    row = ROWS[name]
    method, calls = method_of(name, cell.guidance)
    if not row.pooled:
        path = cell.row(name, samples)
        if not path.exists():
            return None
        drawn = json.loads(path.read_text(encoding="utf-8"))
        right, size = (torch.tensor(drawn["scores"][key]).reshape(-1, samples) for key in ("all", "measured/size"))
        return Outcome(right, size, drawn["spread"], Calls(**drawn["calls"]))
    if pool is None or row.reward not in pool.tables or pool.chains < method.chains:
        return None
    count = min(SAMPLES, pool.chains // method.chains)
    facts = a_world().schedule("euler"), cost_of(row.reward), count, prices(cell.guidance)
    steered = steering_pool.played_back(pool.prompts, pool.tables[row.reward], method, *facts)
    chosen = steered.kept.latents.long().reshape(-1, count)
    of_prompt = torch.arange(len(chosen))[:, None]
    every, _ = jobs(pool.prompts, count)
    pixels = pool.pixels[of_prompt, chosen].flatten(0, 1).float() / 127.5
    right, size = (pool.verdicts[key][of_prompt, chosen] for key in ("all", "measured/size"))
    return Outcome(right, size, metrics.diversity(pixels, every), calls)


def cells(options: argparse.Namespace) -> Iterator[tuple[str, float, list[Cell]]]:
    """Generator, guidance, and its cells by seed; the most important ones first."""
    for policy in [None, *([options.policy] if options.policy else [])]:
        for guidance in options.guidance:
            seeds = [Cell(policy, guidance, seed, options.prompts) for seed in options.seeds]
            yield "base" if policy is None else "policy", guidance, seeds


def draw(options: argparse.Namespace) -> None:
    for number in range(options.chunks):
        for _, _, seeds in cells(options):
            for cell in seeds:
                draw_pool(cell, [number])
    for name in options.rows:
        for seed in options.seeds if not ROWS[name].pooled else ():
            draw_row(Cell(None, 1.0, seed, options.prompts), name, options.samples)


def study(options: argparse.Namespace) -> dict:
    rows = []
    for generator, guidance, seeds in cells(options):
        pools = [cell.pool() for cell in seeds]
        ends = end_rows(seeds, pools)
        plain = [outcome_of(cell, pool, PLAIN, 1) for cell, pool in zip(seeds, pools, strict=True)]
        for name in options.rows:
            outcomes = [outcome_of(p, pool, name, options.samples) for p, pool in zip(seeds, pools, strict=True)]
            there = [outcome for outcome in outcomes if outcome is not None]
            if len(there) == len(seeds):
                rows.append(row_of(name, generator, guidance, seeds[0].tested, there, plain, ends))
    return {
        "config": CONFIG,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "policy": None if options.policy is None else options.policy.name,
        "rows": rows,
    }


def end_rows(seeds: Sequence[Cell], pools: Sequence[steering_pool.Pool | None]) -> dict[float, list[Outcome]]:
    """Best of N at the end by the head, by its calls, for every N that the pools have."""
    rows = {}
    for count in range(1, min((0 if pool is None else pool.chains) for pool in pools) + 1):
        name = END.format(count)
        ROWS.setdefault(name, Row(BestOf(count, decide_at=(1.0,))))
        outcomes = [outcome_of(cell, pool, name, 1) for cell, pool in zip(seeds, pools, strict=True)]
        rows[method_of(name, seeds[0].guidance)[1].total] = [each for each in outcomes if each is not None]
    return rows


def row_of(
    name: str, generator: str, guidance: float, prompts: Sequence[str], outcomes: list[Outcome],
    plain: Sequence[Outcome | None], ends: dict[float, list[Outcome]],
) -> dict:  # fmt: skip
    """A row over all seeds, with the differences to the plain samples and to best of N at the end at no fewer calls.

    Differences are paired by prompt and seed, over all samples that either has.
    """

    def right(results: Sequence[Outcome | None]) -> Tensor:
        return torch.cat([result.right.mean(1) for result in results if result is not None])

    calls = outcomes[0].calls
    for outcome in outcomes[1:]:
        calls += outcome.calls
    calls = calls / len(outcomes)
    every = [prompt for _ in outcomes for prompt in prompts]
    equal = min(ends, key=lambda spent: abs(spent - calls.total)) if ends else None
    less = {PLAIN: plain} if name != PLAIN and len(right(plain)) == len(every) else {}
    if equal is not None and abs(equal - calls.total) < 0.15 * calls.total and name != PLAIN:
        less |= {"the end": ends[equal]}
    spreads = [statistics.mean(outcome.spread.values()) for outcome in outcomes if outcome.spread]
    return {
        "row": name,
        "reward": ROWS[name].reward,
        "generator": generator,
        "guidance": guidance,
        "chains": method_of(name, guidance)[0].chains,
        "samples": outcomes[0].right.shape[1],
        "calls": asdict(calls),
        "right": asdict(metrics.mean_interval(right(outcomes), every)),
        "right per seed": [float(outcome.right.mean()) for outcome in outcomes],
        "right, less that of": {
            other: asdict(metrics.difference_interval(right(outcomes), right(results), every))
            for other, results in less.items()
        },
        "the end's calls": equal if "the end" in less else None,
        "diversity": statistics.mean(spreads) if spreads else None,
        "size": statistics.mean(float(outcome.size.mean()) for outcome in outcomes),
    }


def plot(result: dict, path: Path) -> None:
    """The oracle's score against network calls: a panel for each generator and guidance, a colour for each reward."""
    worlds = list(dict.fromkeys((row["generator"], row["guidance"]) for row in result["rows"]))
    figure = Figure(figsize=(6 * len(worlds), 4.2), layout="constrained")
    colours = dict(zip(("head", "pixel", "random", "oracle"), plots.COLOURS, strict=False))
    for axes, (generator, guidance) in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds, strict=True):
        rows = [row for row in result["rows"] if (row["generator"], row["guidance"]) == (generator, guidance)]
        for row in rows:
            calls, right = sum(row["calls"].values()), row["right"]["value"]
            axes.scatter(calls, right, s=14, color=colours[row["reward"]])
            beside = {"xytext": (4, 1), "textcoords": "offset points", "fontsize": 5.5, "color": plots.GREY}
            axes.annotate(row["row"], (calls, right), **beside)
        axes.set_xlabel("network calls a sample, decodes of the reward among them")
        axes.set_ylabel("right, says the oracle")
        plots.style(axes, f"{generator}, guidance {guidance:g}")
    path.write_bytes(plots.png(figure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/steering.json"))
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--prompts", type=int, default=32, help="test prompts, the first ones")
    parser.add_argument("--chunks", type=int, default=8, help="of the pools: 8 chains of each prompt and seed in each")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each prompt and seed, of rows without a pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(studies.SEEDS))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--policy", type=Path, metavar="RUN", help="a finished run, whose policy is steered too")
    parser.add_argument("--there", action="store_true", help="draw nothing: only what is there, into the results")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the plot of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        if not options.there:
            draw(options)
        studies.write(options.out, study(options))
    print(study_tables.of_files("steering", options.out))
    plot(json.loads(options.out.read_text(encoding="utf-8")), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
