"""Choosing and steering on the shapes world: how many samples are right, and at how many calls.

    python bench/study_steering.py                              all of it: hours on two cores
    python bench/study_steering.py --rows base "best of 8, at 0.5" --prompts 16 --samples 2 --seeds 0 --guidance 1

Every row is a method with a reward: the head inside the package, a pixel reward trained on the same labels (at clean
predictions, at the calls of the head's row, decodes among them), chance, and the oracle itself, the ceiling.  Samples
begin at the same noises in every row.  What is there is not drawn again, so a stopped study goes on.  The generators
are the base and, with --policy RUN, a run's policy.
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

from bench import studies
from bench.study_spine import slug
from prfl.backbone import Backbone
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.evaluation import metrics, plots
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import finished_run_config, load_policy
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_reward
from prfl.factory.steering import decode_price
from prfl.reward.pixel import PixelReward
from prfl.rollout.sampling import SamplingSettings, decode_all, jobs
from prfl.rollout.solvers import SOLVERS, SolverSchedule
from prfl.steering.best_of import BestOf
from prfl.steering.budget import Method, calls_of, within
from prfl.steering.calls import Calls, Prices
from prfl.steering.dlbs import BeamSearch
from prfl.steering.doit import Doit
from prfl.steering.dts import TreeSearch
from prfl.steering.fk import FkSteering
from prfl.steering.guidance import GuidedSampling
from prfl.steering.latsearch import LatSearch
from prfl.steering.looks import callable_look, latent_look, pixel_look, random_look
from prfl.steering.noise import NoiseSearch
from prfl.steering.process import Look
from prfl.steering.sampling import steer
from prfl.steering.svdd import Svdd
from prfl.toy import clips as shapes
from prfl.utils.files import atomic_write

CONFIG = "configs/tiny/best.yaml"
RUNS = Path("runs/study-steering")
PIXEL = Path("runs/study-reward/pixel-0/reward")  # of bench/study_reward.py
SAMPLES = 8


@dataclass(frozen=True)
class Row:
    """equal_to: the row whose network calls are this one's budget."""

    method: Method
    reward: str = "head"
    solver: str = "euler"
    equal_to: str | None = None


HALVING = {"0.4 and 0.7": (0.4, 0.7), "0.5 and 0.75": (0.5, 0.75)}
AT = {f"at {share:g}": (share,) for share in (0.5, 0.75)} | {"at the end": (1.0,)}
NOISY = "ancestral"
PLAIN = "base"
METHODS = {
    PLAIN: Row(BestOf(1), "random"),
    **{f"best of {n}, {name}": Row(BestOf(n, decide_at=at)) for n in (2, 4, 8, 16) for name, at in AT.items()},
    **{f"halving {n}, {name}": Row(BestOf(n, decide_at=at)) for n in (8, 16) for name, at in HALVING.items()},
    "base, ancestral": Row(BestOf(1), "random", NOISY),
    "best of 8, at 0.5, ancestral": Row(BestOf(8, decide_at=(0.5,)), "head", NOISY),
    "svdd of 8": Row(Svdd(8), "head", NOISY),
    "svdd of 32, every 2": Row(Svdd(32, every=2), "head", NOISY),
    "svdd of 32, every 2, strength 4": Row(Svdd(32, every=2, strength=4.0), "head", NOISY),
    "fk of 4": Row(FkSteering(4), "head", NOISY),
    "fk of 4, strength 4": Row(FkSteering(4, strength=4.0), "head", NOISY),
    "fk of 8, max": Row(FkSteering(8, potential="max"), "head", NOISY),
    "fk of 8, sum": Row(FkSteering(8, potential="sum"), "head", NOISY),
    "dlbs, 2 beams of 2": Row(BeamSearch(2, children=2), "head", NOISY),
    "dlbs, 2 beams of 2, 2 ahead": Row(BeamSearch(2, children=2, lookahead=2, every=5), "head", NOISY),
    "tree of 4": Row(TreeSearch(4), "head", NOISY),
    "tree of 4, greedy": Row(TreeSearch(4, greedy=True), "head", NOISY),
    "latsearch of 6": Row(LatSearch(6)),
    "doit": Row(Doit(4)),
    "noise, 3 rounds of 4": Row(NoiseSearch(4)),
    "guidance": Row(GuidedSampling(1)),
    "guidance, strength 3": Row(GuidedSampling(1, strength=3.0)),
    "guidance, best of 2": Row(GuidedSampling(2)),
}
COMPARED = ("best of 8, at 0.5", "best of 8, at the end", "halving 8, 0.5 and 0.75", "fk of 4", "svdd of 8")
ROWS = METHODS | {
    f"{name} ({reward})": replace(METHODS[name], reward=reward, equal_to=None if reward == "random" else name)
    for name in COMPARED
    for reward in ("pixel", "random", "oracle")
}


# ------------------------------------------------------------------------------- one process each, called by the study


class World:
    """A generator at one guidance scale and seed, and the rewards that steer it."""

    def __init__(self, policy: Path | None, guidance: float, seed: int) -> None:
        base = [f"evaluation.seed={seed}", f"evaluation.guidance_scale={guidance}", "evaluation.steps=20"]
        self.config: Config = load_config(CONFIG, base)
        if policy is not None:
            self.config = finished_run_config(policy, base)
        self.model: Backbone = build_backbone(self.config)
        self.adapter = None
        if policy is not None:
            load_policy(self.config, self.model)
            self.adapter = policy_adapter_name(self.config)
        self.settings: SamplingSettings = sampling_settings(self.config)
        self.prices = Prices(1.0 if guidance == 1 else 2.0, decode_price(self.config))
        self.head = load_reward("shapes", self.model, adapter_name="steering")
        self.seed = seed

    def looks(self, reward: str) -> list[Look]:
        match reward:
            case "head":
                return [latent_look(self.head, aggregate="logsigmoid")]  # type: ignore[arg-type] # a latent one
            case "pixel":
                pixel = PixelReward.from_pretrained(PIXEL)
                return [pixel_look(pixel, self.model, aggregate="logsigmoid")]
            case "random":
                return [random_look(self.seed)]
        return [callable_look(verdicts, self.model)]

    def schedule(self, solver: str) -> SolverSchedule:
        shape = self.model.latent_shape(self.settings.frames, self.settings.height, self.settings.width)
        sigmas = self.model.sigmas(self.settings.steps, shape, self.settings.shift)
        keys = {"eta": 1.0} if solver == NOISY else {}
        return SOLVERS[solver](sigmas, **keys)

    def method(self, name: str) -> Method:
        """The row's method, with as many chains as the calls of another row allow."""
        row = ROWS[name]
        if row.equal_to is None:
            return row.method
        budget = self.calls(row.equal_to).total
        return within(budget, row.method, self.schedule(row.solver), self.looks(row.reward), self.prices)

    def calls(self, name: str) -> Calls:
        row = ROWS[name]
        return calls_of(self.method(name), self.schedule(row.solver), self.looks(row.reward), self.prices)


def verdicts(pixels: Tensor, prompts: list[str]) -> Tensor:
    """The oracle's share of right labels, above it whether all of them are."""
    judged = shapes.judge(pixels, prompts)
    return torch.stack([judged[name] for name in studies.DIMENSIONS]).mean(0) + judged["all"]


def draw(world: World, name: str, prompts: Sequence[str], samples: int) -> dict:
    """One row of one generator: the oracle's verdict on every sample, and what one has cost."""
    row, method = ROWS[name], world.method(name)
    every, indices = jobs(prompts, samples)
    settings = replace(world.settings, batch=64)
    latents, calls = [], Calls()
    for _, steered in steer(
        world.model, every, indices, method, settings, world.schedule(row.solver), world.looks(row.reward),
        adapter=world.adapter, decode_price=world.prices.decode,
    ):  # fmt: skip
        latents.append(steered.kept.latents.float().cpu())
        calls += steered.calls
    pixels = decode_all(world.model, torch.cat(latents))
    judged = shapes.judge(pixels, every)
    spread = metrics.diversity(pixels, every) if samples > 1 else {}
    scores = {key: values.tolist() for key, values in judged.items()}
    facts = {"chains": method.chains, "calls": asdict(calls / len(every)), "spread": spread}
    return {"prompts": every, "scores": scores, **facts}


def worker(options: argparse.Namespace) -> None:
    """All rows of one generator, guidance and seed, as far as they are not there."""
    torch.set_num_threads(1)
    world = None
    for name in options.rows:
        out = path_of(options, name, options.guidance[0], options.seeds[0], options.policy)
        if out.exists():
            continue
        world = world or World(options.policy, options.guidance[0], options.seeds[0])
        prompts = load_prompts(world.config.data)["test"][: options.prompts]
        result = draw(world, name, prompts, options.samples)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(out) as temporary:
            temporary.write_text(json.dumps(result), encoding="utf-8")
        right = statistics.mean(result["scores"]["all"])
        print(f"{out.parent.name} {name}: {right:.3f}, {sum(result['calls'].values()):.1f} calls", flush=True)


def path_of(options: argparse.Namespace, name: str, guidance: float, seed: int, policy: Path | None) -> Path:
    generator = "base" if policy is None else policy.name
    folder = RUNS / f"{generator}-{guidance:g}-{seed}-{options.prompts}x{options.samples}"
    return folder / f"{slug(name)}.json"


# ------------------------------------------------------------------------------------------------------------ the study


def generators(options: argparse.Namespace) -> Iterator[tuple[str, Path | None]]:
    yield "base", None
    if options.policy is not None:
        yield "policy", options.policy


def study(options: argparse.Namespace) -> dict:
    worlds = [(who, g) for who in generators(options) for g in options.guidance]
    tasks = [(policy, g, seed) for (_, policy), g in worlds for seed in options.seeds]

    def work(task: tuple[Path | None, float, int]) -> None:
        policy, guidance, seed = task
        command = [__file__, "--worker", "--rows", *options.rows, "--guidance", str(guidance), "--seeds", str(seed)]
        command += ["--prompts", str(options.prompts), "--samples", str(options.samples)]
        studies.run([*command, *(["--policy", str(policy)] if policy else [])], RUNS / "console.txt")

    if options.jobs == 1:
        list(map(work, tasks))
    else:
        with studies.pool() as pool:
            list(pool.map(work, tasks))
    rows = [
        row_of(options, name, generator, policy, guidance)
        for (generator, policy), guidance in worlds
        for name in options.rows
    ]
    return {
        "config": CONFIG,
        "prompts": options.prompts,
        "samples": options.samples,
        "seeds": options.seeds,
        "policy": None if options.policy is None else options.policy.name,
        "rows": rows,
    }


def row_of(options: argparse.Namespace, name: str, generator: str, policy: Path | None, guidance: float) -> dict:
    """A row over all seeds, with the paired difference to the plain samples and to best of 8 at the end."""

    def over_seeds(other: str) -> list[dict]:
        paths = [path_of(options, other, guidance, seed, policy) for seed in options.seeds]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def right(results: list[dict]) -> Tensor:
        return torch.tensor([value for result in results for value in result["scores"]["all"]])

    results = over_seeds(name)
    prompts = [prompt for result in results for prompt in result["prompts"]]
    spreads = [statistics.mean(result["spread"].values()) for result in results if result["spread"]]
    less = {
        other: asdict(metrics.difference_interval(right(results), right(over_seeds(other)), prompts))
        for other in (PLAIN, "best of 8, at the end")
        if other in options.rows and other != name
    }
    return {
        "row": name,
        "reward": ROWS[name].reward,
        "generator": generator,
        "guidance": guidance,
        "chains": results[0]["chains"],
        "calls": results[0]["calls"],
        "right": asdict(metrics.mean_interval(right(results), prompts)),
        "right per seed": [statistics.mean(result["scores"]["all"]) for result in results],
        "right, less that of": less,
        "diversity": statistics.mean(spreads) if spreads else None,
        "size": statistics.mean(v for result in results for v in result["scores"]["measured/size"]),
    }


def table(result: dict) -> None:
    print(f"{result['prompts']} prompts x {result['samples']} samples, seeds {result['seeds']}\n")
    print("| generator | guidance | row | calls | right | less plain | less best of 8, at the end | diversity |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in result["rows"]:
        less = [row["right, less that of"].get(other) for other in (PLAIN, "best of 8, at the end")]
        shown = [f"{x['value']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" if x else "" for x in less]
        calls, spread = sum(row["calls"].values()), row["diversity"]
        facts = f"{row['generator']} | {row['guidance']:g} | {row['row']} | {calls:.0f} | {row['right']['value']:.3f}"
        print(f"| {facts} | {shown[0]} | {shown[1]} | {'' if spread is None else f'{spread:.3f}'} |")


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
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each prompt and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(studies.SEEDS))
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--policy", type=Path, metavar="RUN", help="a finished run, whose policy is steered too")
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=2, help="processes at a time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="only print the table and draw the plot of the results")
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    if not options.table:
        studies.write(options.out, study(options))
    result = json.loads(options.out.read_text(encoding="utf-8"))
    table(result)
    plot(result, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
