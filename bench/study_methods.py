"""Which recipe gives the most held-out reward per network evaluation and per second?  Every method, equal budgets.

    python bench/study_reward.py        first: it trains the rewards
    python bench/study_methods.py --pace                on an idle machine; into the results, where they are there
    python bench/study_methods.py [--evaluations 1000] [--methods prfl "dense, beta 1" ...] [--add] [--out ...]

1. Every recipe starts from the same base, follows the same latent reward (vader the pixel reward from the same labels)
   and alternates with SFT.  Its steps are as many as the budget of network evaluations allows: a forward counts 1, one
   with its backward 3, a reward's the share of blocks that it reads.  Where a rollout serves several steps, those that
   the runs really made are counted beside those that were planned.
2. Two learning rates each, seed 0, compared on validation prompts; the better one runs with three seeds (``--seeds``).
   Rounds on validation prompts during each run are its learning curve, and what a recipe is chosen by; test prompts are
   drawn at the end.
3. Seconds per step are measured with nothing beside them (``--pace``), and give the curves over time and the results
   at equal time.  Saved bytes: what autograd keeps at the peak of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench import studies
from bench import study_spine as spine
from bench.harness import study_tables
from prfl.config import load_config
from prfl.estimate import nfe
from prfl.estimate.live_tensors import SavedBytes
from prfl.factory.backbone import build_backbone
from prfl.factory.reward import load_followed_reward
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward

RUNS = Path("runs/study-methods")
ROUNDS = 3
RATES = ("1e-3", "4e-4")
BATCH = 16
WARMUP = 0.1  # of a run's steps
PACE = range(4, 16)  # the steps that are timed; their evaluations say what share of a mean step's work they had
LITERATURE = ("draft_k", "draft_lv", "alignprop", "refl", "drtune", "leapalign", "instructvideo", "full chain", "vader")
LABELS = {"evaluations": "network evaluations of one sample", "seconds": "seconds, alone on one thread"}
LATENT, PIXEL = spine.LATENT, spine.PIXEL
ENSEMBLE = f"reward.path=[{', '.join(str(spine.REWARDS / f'adapter-{seed}/reward') for seed in studies.SEEDS)}]"
OWN = "data.generator={name: shapes_samples, per_prompt: 72, held_out_per_prompt: 24, steps: 20}"
CLIPS = spine.MIXTURE


FRUGAL = ("rollout.stride=2", "rollout.gradients_per_rollout=4")
THRIFTY = ("rollout.stride=4", "rollout.gradients_per_rollout=8")
RARER = "objective.sft.every=2"


@dataclass(frozen=True)
class Recipe:
    """config: in configs/tiny.  overrides: what makes it another recipe.  clips: what SFT and noised starts read.
    share: of the budget."""

    config: str
    overrides: tuple[str, ...] = ()
    reward: str = LATENT
    clips: str = CLIPS
    share: float = 1.0


RECIPES = {
    "prfl": Recipe("prfl"),
    "prfl, SFT every second step": Recipe("prfl", (RARER,)),
    "prfl, SFT every fourth step": Recipe("prfl", (spine.FOURTH,)),
    "prfl, clean hand-off": Recipe("prfl", ("objective.handoff=clean",)),
    "prfl, unit weights": Recipe("prfl", ("rollout.step_weight=unit",)),
    "prfl, stride 2": Recipe("prfl", ("rollout.stride=2",)),
    "prfl, stride 4": Recipe("prfl", ("rollout.stride=4",)),
    "prfl, 10 steps": Recipe("prfl", ("rollout.steps=10",)),
    "prfl, 4 gradients a rollout": Recipe("prfl", ("rollout.gradients_per_rollout=4",)),
    "prfl, from data, half": Recipe("prfl", ("objective.from_data=0.5",)),
    "prfl, from data": Recipe("prfl", ("objective.from_data=1.0",)),
    "prfl, from own samples": Recipe("prfl", ("objective.from_data=1.0",), clips=OWN),
    "prfl, three heads": Recipe("prfl", ("reward.uncertainty_weight=1.0",), reward=ENSEMBLE),
    "dense, own steps": Recipe("dense_process", ("objective.credit=step",)),
    "dense, beta 0": Recipe("dense_process"),
    "dense, beta 0, SFT every second step": Recipe("dense_process", (RARER,)),
    "dense, beta 1": Recipe("dense_process", ("objective.beta=1.0",)),
    "dense, beta 0, stride 2": Recipe("dense_process", ("rollout.stride=2",)),
    "draft_k": Recipe("draft_k"),
    "draft_lv": Recipe("draft_lv"),
    "alignprop": Recipe("alignprop"),
    "refl": Recipe("refl"),
    "drtune": Recipe("drtune"),
    "leapalign": Recipe("leapalign"),
    "instructvideo": Recipe("instructvideo"),
    "full chain": Recipe("full_chain"),
    "vader": Recipe("vader", reward=PIXEL),
    "prfl, stride 2, 4 gradients": Recipe("prfl", FRUGAL),
    "prfl, stride 4, 8 gradients": Recipe("prfl", THRIFTY),
    "prfl, stride 4, 8 gradients, SFT every second step": Recipe("prfl", (*THRIFTY, RARER)),
    "dense, beta 0, half the budget": Recipe("dense_process", share=1 / 2),
    "prfl, half the budget": Recipe("prfl", share=1 / 2),
    "prfl, SFT every second step, half the budget": Recipe("prfl", (RARER,), share=1 / 2),
    "prfl, stride 2, 4 gradients, half the budget": Recipe("prfl", FRUGAL, share=1 / 2),
    "prfl, stride 4, 8 gradients, half the budget": Recipe("prfl", THRIFTY, share=1 / 2),
    "prfl, stride 4, 8 gradients, SFT every second step, half the budget": Recipe(
        "prfl", (*THRIFTY, RARER), share=1 / 2
    ),
}


def always(name: str) -> list[str]:
    recipe = RECIPES[name]
    return [
        recipe.reward, recipe.clips, "rollout.steps=20", *spine.PAPERS, spine.FALLING, spine.EACH, *recipe.overrides,
        f"training.batch={BATCH}", "evaluation.prompts_per_round=24", "evaluation.samples_per_prompt=4",
        "evaluation.steps=20", "evaluation.final_samples=0",
    ]  # fmt: skip


def config_of(name: str) -> str:
    return f"configs/tiny/{RECIPES[name].config}.yaml"


def evaluations(name: str, first: int = 0, steps: int = 200) -> float:
    """Count network evaluations of one sample in a mean step of these, the regulariser's among them.

    A forward counts 1, one with its backward 3.
    """
    return (_evaluations(name, first + steps) - (_evaluations(name, first) if first else 0.0)) / steps


@cache
def _evaluations(name: str, steps: int) -> float:
    """Count network evaluations of one sample in a run of so many steps."""
    config = load_config(config_of(name), [*always(name), "evaluation.every=0", f"training.steps={steps}"])
    model = build_backbone(config)
    if config.reward is not None and config.reward.space == "latent":
        reward = load_followed_reward(config, model)
        head = reward.members[0] if isinstance(reward, RewardEnsemble) else reward  # the reads of all are counted below
        assert isinstance(head, LatentReward), "a reward in latent space reads the network's blocks"
        share = (max(head.blocks) + 1) / model.facts.num_blocks
    else:
        share = 0.0  # a pixel reward runs no part of the network
    price = {nfe.GRADIENT: 3.0, nfe.REWARD: 3 * share}
    return sum(each.total * price.get(each.name, 1.0) for each in nfe.count_nfe(config, model)) / BATCH


def pace(name: str) -> float:
    """Return the seconds of a mean step without the distance that some of them measure; the same for any budget."""
    name = name.removesuffix(", half the budget")
    overrides = [*always(name), "evaluation.every=0", f"training.steps={PACE.stop - 1}", "training.warmup=0"]
    folder = studies.train(RUNS / f"pace-{spine.slug(name)}", config_of(name), overrides)
    timed = [r for r in studies.records(folder, "seconds/step") if r["step"] in PACE]
    seconds = statistics.mean(record["seconds/step"] - record.get("seconds/distance", 0.0) for record in timed)
    return seconds * evaluations(name) / evaluations(name, PACE.start - 1, len(PACE))


def rollouts(name: str, folder: Path, steps: int) -> dict[str, int]:
    """Count the rollouts of a run that reuses them: those made, and those planned if no drift is too large."""
    ages = [record["rollout_age"] for record in studies.records(folder, "rollout_age")]
    gradients = load_config(config_of(name), always(name)).rollout.gradients_per_rollout
    return {"made": ages.count(0.0), "planned": -(-steps // gradients)} if ages else {}


def saved(name: str) -> int:
    """Return the bytes that autograd keeps at the peak of a step, the regulariser's among them; in its own process."""
    out = RUNS / f"saved-{spine.slug(name)}.json"
    if not out.exists():
        studies.run([__file__, "--saved", name, str(out)], RUNS / "saved.txt")
    return json.loads(out.read_text(encoding="utf-8"))


def count_saved(name: str, out: Path) -> None:
    counted = SavedBytes()
    for objective in spine.objectives_of(load_config(config_of(name), always(name))):
        with counted:
            objective.accumulate(0, list(range(BATCH)))
    out.write_text(json.dumps(counted.peak), encoding="utf-8")


def run(name: str, rate: str, seed: int, steps: int) -> Path:
    of_run = [
        f"training.learning_rate={rate}", f"training.steps={steps}", f"training.warmup={round(WARMUP * steps)}",
        f"evaluation.every={max(1, steps // ROUNDS)}",
    ]  # fmt: skip
    folder = RUNS / f"{spine.slug(name)}-{rate}-{seed}"
    return studies.train(folder, config_of(name), [*always(name), *of_run, f"seed={seed}"])


def curve(folder: Path, price: float, seconds: float) -> list[dict]:
    """Return the rounds on validation prompts, over network evaluations of a sample and over seconds."""
    return [
        {
            "evaluations": record["step"] * price, "seconds": record["step"] * seconds, "step": record["step"],
            **{key: record[key] for key in ("judge/all", "reward/total", "motion", "diversity", "distance")},
        }
        for record in studies.rounds(folder, "judge/all")
    ]  # fmt: skip


def best_rate(name: str, last: Mapping[tuple[str, str], float]) -> str:
    """Return the learning rate whose last round on validation prompts is highest.  last: by recipe and rate."""
    return max(RATES, key=lambda rate: last[name, rate])


def study(names: list[str], budget: float, seeds: Sequence[int]) -> dict:
    prices = {name: evaluations(name) for name in names}
    steps = {name: max(ROUNDS, round(RECIPES[name].share * budget / price)) for name, price in prices.items()}
    paces = {name: pace(name) for name in names}  # one after another: alone

    # The rates with seed 0, then the better one with all seeds.
    with studies.pool() as pool:
        kept = dict(zip(names, pool.map(saved, names), strict=True))
        swept = {(n, rate): pool.submit(run, n, rate, 0, steps[n]) for n in names for rate in RATES}
        last = {key: studies.rounds(each.result(), "judge/all")[-1]["judge/all"] for key, each in swept.items()}
        best = {name: best_rate(name, last) for name in names}
        runs = {(n, s): pool.submit(run, n, best[n], s, steps[n]) for n in names for s in seeds}
        folders = {key: each.result() for key, each in runs.items()}
        rows = spine.tested(pool, folders, names, seeds)
    return {
        "budget": f"{budget:g} network evaluations of a sample: forward 1, with backward 3, SFT's step among them",
        "recipes": {
            n: {
                "config": config_of(n), "overrides": always(n), "rate": best[n], "steps": steps[n],
                "evaluations per step": prices[n], "seconds per step": paces[n], "saved bytes": kept[n],
                "swept": {rate: last[n, rate] for rate in RATES},
                "rollouts": [rollouts(n, folders[n, seed], steps[n]) for seed in seeds],
                "curves": [curve(folders[n, seed], prices[n], paces[n]) for seed in seeds],
            }
            for n in names
        },
        "rows": rows,
    }  # fmt: skip


def repaced(result: dict, paces: dict[str, float]) -> dict:
    """Put other seconds per step into a result, and the curves' seconds by them."""
    for name in paces.keys() & result["recipes"].keys():
        recipe = result["recipes"][name]
        recipe["seconds per step"] = paces[name]
        for point in (point for curve in recipe["curves"] for point in curve):
            point["seconds"] = point["step"] * paces[name]
    return result


def plot(result: dict, path: Path) -> None:
    """Plot the oracle on validation prompts, mean of the seeds, over network evaluations and over seconds.

    The literature's methods on the left, ours on the right, prfl in both; dotted: half the budget.
    """
    recipes, half = result["recipes"], ", half the budget"
    ours = [name for name in recipes if name not in ("prfl", *LITERATURE) and not name.endswith(half)]
    columns = {"methods of the literature": [name for name in recipes if name in LITERATURE], "ours": ours}

    figure, axes = plt.subplots(2, 2, figsize=(15, 10), sharey=True, layout="constrained")
    for column, (title, names) in enumerate(columns.items()):
        for row, (over, label) in enumerate(LABELS.items()):
            axis = axes[row][column]
            for index, name in enumerate(["prfl", *names]):
                look = {"color": "black", "linewidth": 2.5} if name == "prfl" else {"color": f"C{(index - 1) % 10}"}
                dashes = "-" if index <= 10 else "--"
                _draw(axis, recipes[name], over, linestyle=dashes, label=name, **look)
                if name + half in recipes:
                    _draw(axis, recipes[name + half], over, linestyle=":", **look)
            axis.set_xlabel(label)
            axis.set_ylabel("everything right, of validation samples")
            axis.grid(alpha=0.3)
        axes[0][column].set_title(title)
        axes[0][column].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=80)


def _draw(axis: Axes, recipe: dict, over: str, **look: Any) -> None:
    rounds = list(zip(*recipe["curves"], strict=True))
    x = [points[0][over] for points in rounds]
    axis.plot(x, [statistics.mean(each["judge/all"] for each in points) for points in rounds], marker=".", **look)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=float, default=1000, help="of a sample, for every run")
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=list(RECIPES), help="only these")
    parser.add_argument("--seeds", type=int, default=len(studies.SEEDS), help="of every recipe; default: 3")
    parser.add_argument("--add", action="store_true", help="keep what --out has of others; run prfl again, too")
    parser.add_argument("--pace", action="store_true", help="only the seconds per step, on an idle machine")
    parser.add_argument("--out", type=Path, default=Path("bench/results/methods.json"))
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    parser.add_argument("--saved", nargs=2, help=argparse.SUPPRESS)

    options = parser.parse_args()
    if options.saved:
        count_saved(options.saved[0], Path(options.saved[1]))
    elif options.table:
        print("\n".join(study_tables.of_files(name, options.table) for name in ("methods", "methods_half")))
    elif options.pace:
        paces = {name: pace(name) for name in options.methods}
        print(json.dumps({name: {"seconds": paces[name], "evaluations": evaluations(name)} for name in paces}))
        if options.out.exists():
            result = repaced(json.loads(options.out.read_text(encoding="utf-8")), paces)
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            plot(result, options.out.with_suffix(".png"))
    else:
        result = study(options.methods, options.evaluations, range(options.seeds))
        studies.write(options.out, result, "recipes" if options.add else "")
        plot(json.loads(options.out.read_text(encoding="utf-8")), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
