"""Choosing and steering on the shapes world: how many samples are right, and at how many calls.

    python bench/study_steering.py --policy runs/tiny-best                  hours on two cores
    python bench/study_steering.py --rows base "best of 8, at 0.5" --prompts 16 --chunks 1 --seeds 0 --guidance 1
    python bench/study_steering.py --policy runs/tiny-best --there          only what was drawn, into the results

Every row is a method with a reward: the head inside the package, a pixel reward trained on the same labels (at clean
predictions, at the calls of the head's row, decodes among them), chance, and the oracle itself, the ceiling.  The
generators are the base and, with --policy RUN, a run's policy.

1. Of each generator, guidance and seed a pool of chains is drawn, 8 of each prompt at a time (--chunks), and looked at
   on their way.  Rows that only choose among chains without noise are played back from it (bench/steering_pool.py).
2. The other rows are drawn each by itself (--samples of each prompt and seed), with the fewest steps: of the base
   without guidance, and with --everywhere of all.

What is there is not drawn again, so a stopped study goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import steering_pool, studies
from bench.harness import study_tables
from bench.steering_plot import plot
from bench.steering_rows import (
    AIMED,
    CONFIG,
    PIXEL,
    PLAIN,
    ROWS,
    STEPS,
    TRIED,
    Row,
    World,
    a_world,
    cost_of,
    method_of,
    pixel_reward,
    prices,
)
from bench.study_spine import slug
from prfl.evaluation import metrics
from prfl.factory.prompts import load_prompts
from prfl.rollout.sampling import decode_all, jobs
from prfl.steering.best_of import BestOf
from prfl.steering.calls import Calls
from prfl.steering.sampling import steer
from prfl.toy import clips as shapes
from prfl.utils import rng
from prfl.utils.files import atomic_write

RUNS = Path("runs/study-steering")
SAMPLES = 8
ORDERS = 16  # ways in which a pool of 8 chains is shared out; a larger one in fewer
EVERY_ROW = ROWS | TRIED
MOST = 20  # chains of a row that others are compared with
NEAR = 0.15  # of its calls: best of N at the end that a row is compared with


# --------------------------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Cell:
    """A generator at a guidance and a seed: where its files are."""

    policy: Path | None
    guidance: float
    seed: int
    steps: int
    prompts: int
    batch: int = 64

    @property
    def folder(self) -> Path:
        who = "base" if self.policy is None else "policy"
        return RUNS / f"{who}-{self.guidance:g}-{self.seed}-{self.steps}x{self.prompts}"

    @property
    def world(self) -> World:
        return World(self.policy, self.guidance, self.seed, self.steps, self.batch)

    def chunk(self, number: int) -> Path:
        return self.folder / f"chains-{number}.safetensors"

    def row(self, name: str, samples: int) -> Path:
        return self.folder / f"{slug(name)}-{samples}.safetensors"

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
        model = a_world().model
        pixel = pixel_reward(model) if PIXEL.exists() else None
        return steering_pool.load_pool(there, self.tested, self.steps, self.seed, model, pixel, self.batch)


def draw_pool(cell: Cell, chunks: Sequence[int]) -> None:
    missing = [number for number in chunks if not cell.chunk(number).exists()]
    world, together = cell.world if missing else None, max(1, cell.batch // steering_pool.CHUNK)
    for number in missing:
        assert world is not None
        steering_pool.draw_chunk(cell.chunk(number), world.begin, world.model, cell.tested, number, together)
        print(cell.chunk(number), flush=True)


def draw_row(cell: Cell, name: str, samples: int) -> None:
    """One row by itself: the oracle's verdict on every sample, and what one has cost."""
    out = cell.row(name, samples)
    if out.exists():
        return
    world, row = cell.world, EVERY_ROW[name]
    method, _ = method_of(row, cell.guidance, cell.steps)
    every, indices = jobs(cell.tested, samples)
    latents, calls = [], Calls()
    for _, steered in steer(
        world.model, every, indices, method, world.settings, world.schedule(row.solver, cell.steps),
        [world.look(row.reward)], adapter=world.adapter, decode_price=world.prices.decode,
    ):  # fmt: skip
        latents.append(steered.kept.latents.float().cpu())
        calls += steered.calls
    pixels = decode_all(world.model, torch.cat(latents))
    judged = shapes.judge(pixels, every)
    result = {"right": judged["all"], "size": judged["measured/size"], "pixels": steering_pool.as_bytes(pixels)}
    spent = torch.tensor(list(asdict(calls / len(every)).values()), dtype=torch.float64)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        shaped = {key: x.unflatten(0, (-1, samples)).contiguous() for key, x in result.items()}
        save_file({"calls": spent, **shaped}, temporary)
    print(f"{out}: {float(result['right'].mean()):.3f}, {float(spent.sum()):.1f} calls", flush=True)


# ------------------------------------------------------------------------------------------------------------ the study


@dataclass(frozen=True, eq=False)
class Outcome:
    """A row at one cell.  right, size: (prompts, samples).  pixels: (prompts, different samples, ...), 0 to 255."""

    right: Tensor
    size: Tensor
    pixels: Tensor
    calls: Calls


def outcome_of(
    cell: Cell, pool: steering_pool.Pool | None, row: Row, name: str = "", samples: int = 0
) -> Outcome | None:
    """What is there of a row; None where it was not drawn.  name, samples: of one without a pool."""
    method, calls = method_of(row, cell.guidance, cell.steps)
    if not row.pooled:
        path = cell.row(name, samples)
        if not path.exists():
            return None
        drawn = load_file(path)
        return Outcome(drawn["right"], drawn["size"], drawn["pixels"], Calls(*drawn["calls"].tolist()))
    if pool is None or row.reward not in pool.tables or pool.chains < method.chains:
        return None

    # The pool's chains are shared out in several ways, which makes the mean over them a steadier one.
    count = pool.chains // method.chains
    facts = a_world().schedule("euler", cell.steps), cost_of(row.reward), count, prices(cell.guidance)
    of_prompt, chosen = torch.arange(len(pool.prompts))[:, None], []
    for number in range(max(1, ORDERS * SAMPLES // pool.chains) if count < pool.chains else 1):
        order = torch.tensor(rng.permutation(pool.chains, 0, "order", number))
        table = pool.tables[row.reward]
        table = table if row.reward == "random" else table[:, order]  # chance knows no chain
        steered = steering_pool.played_back(pool.prompts, table, method, *facts)
        chosen.append(order[steered.kept.latents.long().reshape(-1, count)])
    right, size = (pool.verdicts[key][of_prompt, torch.cat(chosen, 1)] for key in ("all", "measured/size"))
    return Outcome(right, size, pool.pixels[of_prompt, chosen[0]], calls)


def cells(options: argparse.Namespace) -> Iterator[tuple[str, float, int, list[Cell]]]:
    """Generator, guidance and steps, and its cells by seed; the most important ones first."""
    generators = [*([] if options.only_policy else [None]), *([options.policy] if options.policy else [])]
    for policy in generators:
        for guidance, steps in product(options.guidance, options.steps):
            seeds = [Cell(policy, guidance, seed, steps, options.prompts, options.batch) for seed in options.seeds]
            yield "base" if policy is None else "policy", guidance, steps, seeds


def draw(options: argparse.Namespace) -> None:
    for number in range(options.chunks):
        for *_, seeds in cells(options):
            for cell in seeds:
                draw_pool(cell, [number])
    apart = [name for name in options.rows if not EVERY_ROW[name].pooled]
    for generator, guidance, steps, seeds in cells(options):
        plain = generator == "base" and guidance == 1
        if steps == options.steps[-1] and (plain or options.everywhere):
            for name, cell in product(apart, seeds):
                spent = method_of(EVERY_ROW[name], guidance, steps)[1].total
                if name in ROWS or 0.75 * AIMED < spent <= AIMED:
                    draw_row(cell, name, options.samples)


def study(options: argparse.Namespace) -> dict:
    rows = []
    for generator, guidance, steps, seeds in cells(options):
        pairs = [(cell, cell.pool()) for cell in seeds]
        facts = {"generator": generator, "guidance": guidance, "steps": steps}
        ends: dict[tuple[int, ...], dict[float, list[Outcome]]] = {}
        for name in options.rows:
            row = EVERY_ROW[name]
            outcomes = [outcome_of(*pair, row, name, options.samples) for pair in pairs]
            there = [(pair, outcome) for pair, outcome in zip(pairs, outcomes, strict=True) if outcome is not None]
            if there:
                drawn = tuple(cell.seed for (cell, _), _ in there)
                if drawn not in ends:
                    ends[drawn] = ends_of([pair for pair, _ in there])
                plain = [outcome_of(*pair, ROWS[PLAIN]) for pair, _ in there]
                measured = row_of(row, seeds[0], [outcome for _, outcome in there], plain, ends[drawn])
                rows.append({"row": name, **facts, "seeds": drawn, **measured})
    return {
        "config": CONFIG,
        "prompts": options.prompts,
        "policy": None if options.policy is None else options.policy.name,
        "rows": rows,
    }


def joined(old: dict, new: dict) -> dict:
    """The new result with the rows of the old one that it has not, whose chains may be gone.

    Of a row that both have it takes the one of more videos.  Raises SystemExit where it has as many in both and differs
    in a seed by more than another processor's last bits: then they are not of the same chains, or not of one policy.
    """

    def key(row: dict) -> tuple:
        return row["row"], row["generator"], row["guidance"], row["steps"]

    def videos(row: dict) -> int:
        return row["samples"] * len(row["seeds"])

    rows = {key(row): row for row in old["rows"]}
    for row in new["rows"]:
        before = rows.get(key(row), {"right per seed": [], "seeds": [], "samples": 0})
        there, here = before["right per seed"], row["right per seed"]
        alike = before["samples"] == row["samples"]
        if alike and any(abs(a - b) > studies.SAME for a, b in zip(there, here, strict=False)):
            raise SystemExit(f"{key(row)}: {there} there and {here} here")
        if videos(row) >= videos(before):
            rows[key(row)] = row
    earlier = {name: old[name] for name in ("command", "commit", "sources")}
    return {**new, "policy": new["policy"] or old["policy"], "rows": list(rows.values()), "earlier rows by": earlier}


Pair = tuple[Cell, steering_pool.Pool | None]


def ends_of(pairs: Sequence[Pair]) -> dict[float, list[Outcome]]:
    """Best of N at the end by the head, by its calls, for every N that the pools have."""
    rows = {}
    for count in range(1, min(MOST, *((0 if pool is None else pool.chains) for _, pool in pairs)) + 1):
        row = Row(BestOf(count, decide_at=(1.0,)))
        outcomes = [outcome_of(*pair, row) for pair in pairs]
        rows[outcomes[0].calls.total] = [each for each in outcomes if each is not None]  # type: ignore[union-attr]
    return rows


def row_of(
    row: Row, cell: Cell, outcomes: list[Outcome], plain: Sequence[Outcome | None], ends: dict[float, list[Outcome]]
) -> dict:
    """A row over its seeds, with the differences to one sample and to best of N at the end at about as many calls.

    cell: any of them.  Differences are paired by prompt and seed, over all samples that either has.
    Diversity is between the samples of a prompt, those of other seeds too.
    """

    def right(results: Sequence[Outcome | None]) -> Tensor:
        return torch.cat([result.right.mean(1) for result in results if result is not None])

    calls = outcomes[0].calls
    for outcome in outcomes[1:]:
        calls += outcome.calls
    calls = calls / len(outcomes)
    every = [prompt for _ in outcomes for prompt in cell.tested]
    equal = min(ends, key=lambda spent: abs(spent - calls.total)) if ends else None
    less: dict[str, Sequence[Outcome | None]] = {}
    if row != ROWS[PLAIN] and all(plain):
        less[PLAIN] = plain
        if equal is not None and abs(equal - calls.total) < NEAR * calls.total:
            less["the end"] = ends[equal]
    count = min(outcome.pixels.shape[1] for outcome in outcomes)
    pixels = torch.cat([outcome.pixels[:, :count].flatten(0, 1) for outcome in outcomes]).float() / 127.5
    spread = metrics.diversity(pixels, jobs(cell.tested, count)[0] * len(outcomes))
    return {
        "reward": row.reward,
        "chains": method_of(row, cell.guidance, cell.steps)[0].chains,
        "samples": count,
        "calls": asdict(calls),
        "right": asdict(metrics.mean_interval(right(outcomes), every)),
        "right per seed": [float(outcome.right.mean()) for outcome in outcomes],
        "right, less that of": {
            other: asdict(metrics.difference_interval(right(outcomes), right(results), every))
            for other, results in less.items()
        },
        "the end's calls": equal if "the end" in less else None,
        "diversity": statistics.mean(spread.values()) if spread else None,
        "size": statistics.mean(float(outcome.size.mean()) for outcome in outcomes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/steering.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/steering.png"))
    parser.add_argument(
        "--rows", choices=(*EVERY_ROW, "tried"), nargs="+", default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--prompts", type=int, default=32, help="test prompts, the first ones")
    parser.add_argument("--chunks", type=int, default=8, help="of the pools: 8 chains of each prompt and seed in each")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt and seed, of rows without a pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(studies.SEEDS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of the chains")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--batch", type=int, default=64, help="chains in a network call; on a GPU thousands")
    parser.add_argument("--everywhere", action="store_true", help="rows without a pool of all, too")
    parser.add_argument("--policy", type=Path, metavar="RUN", help="a finished run, whose policy is steered too")
    parser.add_argument("--only-policy", action="store_true", help="not the base")
    parser.add_argument("--there", action="store_true", help="draw nothing: only what is there, into the results")
    parser.add_argument("--draw-only", action="store_true", help="no results: another process has other chains to draw")
    parser.add_argument("--add", action="store_true", help="keep the rows of --out that were not drawn again")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the plot of the results")
    options = parser.parse_args()
    if options.rows == ["tried"]:
        options.rows = [PLAIN, *TRIED]
    torch.set_num_threads(1)
    if not options.table:
        if not options.there:
            draw(options)
            if options.draw_only:
                return
        result = study(options)
        if options.add:
            result = joined(json.loads(options.out.read_text(encoding="utf-8")), result)
        studies.write(options.out, result)
    print(study_tables.of_files("steering", options.out))
    plot(json.loads(options.out.read_text(encoding="utf-8")), options.picture)


if __name__ == "__main__":
    main()
