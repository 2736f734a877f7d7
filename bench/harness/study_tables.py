"""The tables of studies and counts, from their result files: ``TABLES`` has them by the names that pages use.

Each function takes what a file holds and returns the head and the body of its table, as text.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness.bundle import read_result
from bench.harness.critic_tables import critic, critic_accuracy
from bench.harness.gpu_tables import gpu_steps
from bench.harness.label_tables import labels
from bench.harness.reward_tables import public_rewards, public_rewards_cpu
from bench.studies import DIMENSIONS, interval

Table = tuple[Sequence[str], list[list[str]]]
Result = Mapping[str, Any]

WIDTH = 100  # columns of a line of a page
HALF = ", half the budget"


def of_files(name: str, *files: Path) -> str:
    """Write the table of this name from its result files."""
    return markdown(*TABLES[name](*map(read_result, files)))


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Write a table; one that is wider goes on in further ones below, each with the first column."""

    def written(columns: Sequence[int]) -> list[str]:
        return [f"| {' | '.join(line[i] for i in columns)} |\n" for line in (head, ["---"] * len(head), *body)]

    tables = fitting(len(head), lambda columns: max(map(len, written(columns))) <= width + 1)  # the line's end
    return "\n".join("".join(written(columns)) for columns in tables)


def fitting(count: int, fits: Callable[[Sequence[int]], bool], together: Sequence[int] = ()) -> list[list[int]]:
    """Share out columns among tables that fit, each with the first column and as many more as it takes.

    together: columns that begin a table of their own where the whole does not fit.
    """
    apart = [] if fits(range(count)) else together
    groups: list[list[int]] = [[0]]
    for i in range(1, count):
        if len(groups[-1]) > 1 and (not fits([*groups[-1], i]) or (i in apart and i - 1 not in apart)):
            groups.append([0])
        groups[-1].append(i)
    return groups


# --------------------------------------------------------------------------------------------------- training studies


def spine(result: Result) -> Table:
    """bench/study_spine.py: methods in the same time, without and with guidance."""
    body = []
    for row in result["rows"]:
        cost = result["cost"].get(row["generator"], {})
        body.append([
            f"{row['generator']}; {row['guidance']:g}", interval(_right(row)), _less(row, "base"),
            f"{row['diversity']['value']:.3f}", f"{_reward(row):.2f}",
            f"{cost['seconds per step']:.2f}" if cost else "",
            f"{cost['peak bytes above the loaded baseline'] / 2**20:.0f}" if cost else "",
        ])  # fmt: skip
    head = ["generator; guidance", "all right", "less the base's", "diversity", "trained reward", "s/step", "peak MiB"]
    return head, body


def methods(result: Result) -> Table:
    """bench/study_methods.py: recipes with the whole budget, the best on validation prompts first."""
    return _recipes(result, lambda name: not name.endswith(HALF))


def methods_half(result: Result) -> Table:
    """The same with half the budget."""
    return _recipes(result, lambda name: name.endswith(HALF))


def _recipes(result: Result, chosen: Callable[[str], bool]) -> Table:
    rows = {row["generator"]: row for row in result["rows"] if row["generator"] != "base"}
    body = []
    for name in sorted(filter(chosen, rows), key=lambda name: -_ended(result, name, "judge/all")):
        row, recipe = rows[name], result["recipes"][name]
        equal = at_equal(recipe["curves"])["seconds"]
        body.append([
            name.removesuffix(HALF), f"{_ended(result, name, 'judge/all'):.3f}", f"{_right(row)['value']:.3f}",
            _less(row, "prfl"), _by_seed(row, rows["prfl"]), f"{_reward(row):.2f}",
            *(f"{equal[seconds]:.3f}" if seconds in equal else "" for seconds in ("30", "55")),
            f"{_ended(result, name, 'motion'):.2f}", f"{row['diversity']['value']:.3f}",
            f"{_ended(result, name, 'distance'):.3f}", f"{recipe['evaluations per step']:.1f}",
            f"{recipe['seconds per step']:.2f}", f"{recipe['seconds per step'] * recipe['steps']:.0f}",
            f"{recipe['saved bytes'] / 2**20:.0f}",
        ])  # fmt: skip
    head = ["recipe", "validation", "all right", "less prfl's", "by seed", "trained reward", "at 30 s", "at 55 s",
            "motion", "diversity", "distance", "evaluations a step", "s/step", "s in all", "saved MiB"]  # fmt: skip
    return head, body


SUMMARY = {  # the README's rows: as the file calls them
    "the base model": "base",
    "VADER: pixel reward, last step": "vader",
    "LeapAlign, the best other published method": "leapalign",
    "PRFL as published": "prfl",
    "dense rewards along the chain (ours)": "dense, beta 0",
    "PRFL, our recipe (`configs/tiny/best.yaml`)": "prfl, stride 4, 8 gradients, SFT every second step",
}


STEERED = {"row": "fk of 6, every 2, strength 4 (read again)", "generator": "base", "guidance": 1.0, "steps": 10}


def summary(result: Result, steered: Result) -> Table:
    """bench/study_methods.py: six rows of it, less the base; and one of bench/study_steering.py, less its own."""
    rows = {row["generator"]: row for row in result["rows"]}
    body = []
    for title, name in SUMMARY.items():
        row, recipe = rows[name], result["recipes"].get(name)
        seconds = f"{recipe['seconds per step'] * recipe['steps']:.0f}" if recipe else ""
        body.append([title, f"{_right(row)['value']:.3f}", _less(row, "base"), seconds])
    row = next(row for row in steered["rows"] if STEERED.items() <= row.items())
    gain = interval(row["right, less that of"]["one sample"], "+")
    body.append(["no training: six chains, resampled by the head", f"{row['right']['value']:.3f}", gain, "0"])
    return ["trained by", "all right", "more than the base", "training, s"], body


EQUAL = {"evaluations": (500, 1000), "seconds": (30, 55)}  # where the curves are read: all runs last that long


def at_equal(curves: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Read the curves at so many evaluations and seconds: the oracle on validation prompts, mean of the seeds.

    Only where all curves reach so far.
    """
    means: dict[str, dict[str, float]] = {over: {} for over in EQUAL}
    for over, values in EQUAL.items():
        for value in values:
            if all(curve[-1][over] >= 0.99 * value for curve in curves):
                means[over][str(value)] = statistics.mean(_read(curve, over, value) for curve in curves)
    return means


def _read(curve: Sequence[Mapping[str, float]], over: str, value: float) -> float:
    """Read a curve between two rounds along a straight line."""
    return float(np.interp(value, [point[over] for point in curve], [point["judge/all"] for point in curve]))


def first_run(result: Result) -> Table:
    """bench/study_first_run.py: what the first command's policy gains, over the seeds."""
    body = []
    for name, spread in result["over the seeds"].items():
        difference = f"{spread['difference']:+.3f} ± {spread['deviation']:.3f}"
        ends = f"{spread['least']:+.3f} to {spread['most']:+.3f}"
        body.append([name, f"{spread['base']:.3f}", f"{spread['policy']:.3f}", difference, ends])
    return ["measure", "base", "policy", "difference ± deviation", "least to most"], body


def lasting(result: Result) -> Table:
    """bench/study_lasting.py: what keeps a longer run's gain."""
    rows = {row["generator"]: row for row in result["rows"] if row["generator"] != "base"}
    body = [
        [
            name, f"{_right(row)['value']:.3f}", _less(row, "plain"), _by_seed(row, rows["plain"]),
            f"{_reward(row):.2f}", f"{row['diversity']['value']:.3f}",
            f"{row['mean']['judge/steadiness']['value']:.3f}",
        ]
        for name, row in sorted(rows.items(), key=lambda item: -_right(item[1])["value"])
    ]  # fmt: skip
    return ["guard", "all right", "less plain's", "by seed", "trained reward", "diversity", "steadiness"], body


def blocks(result: Result) -> Table:
    """bench/study_blocks.py: an adapter on some of the blocks."""
    body = [
        [row["generator"], f"{_right(row)['value']:.3f}", _less(row, "all blocks"), _per_seed(row)]
        for row in result["rows"]
    ]
    return ["adapter on", "all right", "less that on all blocks", "by seed"], body


def rollout(result: Result) -> Table:
    """bench/study_rollout.py: cheaper rollouts."""
    body = []
    for row in result["rows"]:
        nothing = {"cheaper": 0, "cached": [0]}
        share = result["share of the rollouts' evaluations"].get(row["generator"], nothing)
        shares = [f"{share['cheaper']:.0%}", f"{statistics.mean(share['cached']):.0%}"]
        body.append([row["generator"], *shares, f"{_right(row)['value']:.3f}", _less(row, "exact"), _per_seed(row)])
    return ["rollout", "cheaper", "skipped", "all right", "less exact", "by seed"], body


def _right(row: Result) -> Mapping[str, float]:
    return row["mean"]["judge/all"]


def _less(row: Result, other: str) -> str:
    """Write the paired difference to another row without guidance; "" for that row itself."""
    difference = row["right, less that of"].get(f"{other}, guidance 1")
    return interval(difference, "+") if difference else ""


def _per_seed(row: Result) -> str:
    return ", ".join(f"{value:.3f}" for value in row["right per seed"])


def _by_seed(row: Result, reference: Result) -> str:
    """Write the differences to another row, seed by seed."""
    if row is reference:
        return ""
    again = reference.get("right per seed, again", reference["right per seed"])
    return ", ".join(f"{here - there:+.2f}" for here, there in zip(row["right per seed"], again, strict=False))


def _reward(row: Result) -> float:
    return sum(row["mean"][f"reward/{name}"]["value"] for name in DIMENSIONS) / len(DIMENSIONS)


def _ended(result: Result, name: str, key: str) -> float:
    """Return a measure on validation prompts at the end of the runs, mean of the seeds."""
    return statistics.mean(curve[-1][key] for curve in result["recipes"][name]["curves"])


# ------------------------------------------------------------------------------------------------------ reward heads

LEVELS = {"0 to 0.2": (0, 0.2), "0.4 to 0.5": (0.4, 0.5), "0.7 to 0.8": (0.7, 0.8), "0.8 to 0.85": (0.8, 0.85),
          "0.9 to 0.925": (0.9, 0.925), "0.925 to 0.95": (0.925, 0.95), "1 (floor)": (1, 1)}  # fmt: skip


def heads(result: Result) -> Table:
    """bench/study_reward.py: everything right together, by noise level, the mean over seeds."""
    from prfl.evaluation.reward_eval import OVERALL

    rows = [row for row in result["accuracy"] if row["dimension"] == OVERALL]
    body = []
    for domain, reward in dict.fromkeys((row["domain"], row["reward"]) for row in rows):
        at = {tuple(row["sigma"]): row for row in rows if (row["domain"], row["reward"]) == (domain, reward)}
        cells = [f"{at[level]['accuracy']:.3f}" for level in LEVELS.values()]
        low, high = at[0, 0.2]["interval of seed 0"]
        body.append([f"{domain}, {reward}", f"{cells[0]} [{low:.3f}, {high:.3f}]", *cells[1:]])
    return ["samples of, reward", *LEVELS], body


# ----------------------------------------------------------------------------------------- memory and work, by counting

PEFT, PEFT_BF16 = "diffusers + peft as it comes (fp32 adapters)", "diffusers + peft, bf16 adapters"
BLOCKS = {PEFT: "peft, fp32 adapters", PEFT_BF16: "peft, bf16 adapters", "prfl without kernels": "prfl",
          "prfl, all kernels": "prfl, kernels"}  # fmt: skip
COUNTED_AS = {"cpu": "counted as on a CPU", "cuda": "with the GPU's fused RMS norm"}


def saved(result: Result) -> Table:
    """bench/predicted_memory.py: what a block saves for its backward pass."""
    body = []
    for name, states in result["saved hidden states of a block"].items():
        model, device = name.split(", ")
        body.append([f"{model}, {COUNTED_AS[device]}", *(f"{states[mode]:.1f}" for mode in BLOCKS)])
    return ["a block of", *BLOCKS.values()], body


def peaks(result: Result) -> Table:
    """bench/predicted_memory.py: the peak of one PRFL step."""
    body, cases, kernels = [], result["cases"], ", kernels"
    for name, case in cases.items():
        if name.endswith(kernels):
            continue
        pairs = (case, cases.get(name + kernels))
        body.append([name, *(text for each in pairs for text in _peak(each))])
    return ["81 frames, batch 1", "predicted peak, GB", "aim", "with kernels, GB", "aim"], body


def _peak(case: Result | None) -> tuple[str, str]:
    if case is None:
        return "", ""
    return f"{case['peak GB']:.1f}", f"{case['target GB']:g}" if case["target GB"] else ""


REST = "norms, gates, rotations, copies"


def work(result: Result) -> Table:
    """bench/step_counts.py: where the work of one network call lies."""
    body = []
    for name, kinds in result["calls"].items():
        if not name.endswith(", torch"):
            continue
        call = name.removesuffix(", torch")
        kernels = result["calls"][f"{call}, kernels"]
        attention = sum(of["ms at the roofline"] for kind, of in kinds.items() if kind.startswith("attention"))
        launches = (f"{sum(of['launches'] for of in each.values()):,}" for each in (kinds, kernels))
        products = f"{kinds['matrix products']['ms at the roofline']:,.0f}"
        body.append([call, f"{attention:,.0f}", products, _traffic(kinds[REST]), _traffic(kernels[REST]), *launches])
    head = ["call", "attention, ms", "products, ms", "the rest", "rest, kernels", "launches", "with kernels"]
    return head, body


def _traffic(of: Mapping[str, float]) -> str:
    return f"{of['ms at the roofline']:,.0f} ms, {of['GB']:,.0f} GB"


def gradient(result: Result) -> Table:
    """bench/gradient_cost.py: GPU-seconds of a gradient of 14B at 480p with kernels, by stride and sharing."""
    plans = result["tables"]["14B 480p, full, kernels"]["GPU-seconds of a gradient"]
    keys = [key.removeprefix("stride ").removesuffix(" gradients a rollout").split(", ") for key in plans]
    strides, shared = (list(dict.fromkeys(column)) for column in zip(*keys, strict=True))
    body = [
        [count, *(f"{plans[f'stride {stride}, {count} gradients a rollout']:.1f}" for stride in strides)]
        for count in shared
    ]
    return ["gradients a rollout", *(f"stride {stride}" for stride in strides)], body


def cheaper(result: Result) -> Table:
    """bench/gradient_cost.py: the same with cheaper rollouts."""
    ways = result["cheaper rollouts"]["14B 480p"]
    keys = list(ways["exact"])
    body = [
        [way, f"{costs[keys[0]]:.2f}", *(f"{costs[key]:.1f}" if key in costs else "" for key in keys[1:])]
        for way, costs in ways.items()
    ]
    return ["14B 480p, rollout", "s of a cheaper call", *keys[1:]], body


CARDS = (16, 24, 48, 80, 141)  # GB of memory
SPARE = 1.1  # what is not counted (contexts, workspaces, gaps): a tenth


def cards(memory: Result, cost: Result) -> Table:
    """bench/predicted_memory.py, bench/gradient_cost.py: the smallest card for each case, and what a gradient costs."""
    body = []
    for name, case in memory["cases"].items():
        if "full chain" in name:
            continue
        seconds = _gradient_seconds(cost, name)
        body.append([f"Wan 2.1 {name}", *_card(case), f"{seconds:.1f}" if seconds else ""])
    return ["81 frames, batch 1", "predicted peak, GB", "smallest card", "s a gradient, calculated"], body


MODELS = ("1.3B 480p", "14B 480p, offload", "14B 480p", "14B 720p, kernels", "14B 720p", "I2V 14B 720p")
STEPPED = ("1.3B 480p",)  # bench/results/gpu/ten_minutes.jsonl
GRADIENTS = 8000  # of a run of the shipped configs: 1,000 steps of 8 videos


def models(memory: Result, cost: Result) -> Table:
    """The README's rows of the same: what fits where, how long it takes, and how that is known."""
    body = [["the small model inside, 32 x 32", "", "none: 2 CPU cores", "", "**run**: all results here"]]
    for name in MODELS:
        seconds = _gradient_seconds(cost, name)
        hours = f"{GRADIENTS * seconds / 3600:.0f}" if seconds else ""
        how = "**a step run**, random weights" if name in STEPPED else "predicted, not run"
        body.append([f"Wan 2.1 {name}", *_card(memory["cases"][name]), hours, how])
    return ["model", "peak, GB", "smallest card", "hours, H200", "how that is known"], body


def _card(case: Result) -> tuple[str, str]:
    card = next(size for size in CARDS if size >= SPARE * case["peak GB"])
    return f"{case['peak GB']:.1f}", f"{card} GB"


def _gradient_seconds(cost: Result, name: str) -> float | None:
    """Seconds of a gradient by the plan of the shipped configs; None where it was not calculated."""
    case_name, *mode = name.split(", ")
    plans = cost["tables"].get(", ".join([case_name, "full", *mode]), {}).get("GPU-seconds of a gradient")
    return plans["stride 2, 4 gradients a rollout"] if plans else None


def steering(result: Result) -> Table:
    """bench/study_steering.py: every generator's rows but pairs and chance, with what they cost."""
    body = []
    for row in result["rows"]:
        of_one = row["row"].startswith("one sample")
        if row["row"].startswith("best of 2,") or (row["reward"] == "random" and not of_one):
            continue
        others = row["right, less that of"]
        less = [interval(others[name], "+") if name in others else "" for name in ("one sample", "the end")]
        guided = f", guidance {row['guidance']:g}" if row["guidance"] != 1 else ""
        body.append([
            f"{row['generator']}{guided}, {row['steps']}: {row['row']}", f"{sum(row['calls'].values()):.0f}",
            interval(row["right"]), *less, "" if row["diversity"] is None else f"{row['diversity']:.3f}",
            f"{row['samples'] * result['prompts'] * len(row['seeds'])}",
        ])  # fmt: skip
    head = ["generator, steps: row", "calls", "all right", "less one sample's", "less the end's", "diversity", "videos"]
    return head, body


TABLES: dict[str, Callable[..., Table]] = {
    each.__name__: each
    for each in (
        spine, methods, methods_half, summary, first_run, lasting, blocks, labels, rollout, heads, saved, peaks, work,
        gradient, cheaper, cards, models, steering, public_rewards, public_rewards_cpu, critic,
        critic_accuracy, gpu_steps,
    )
}  # fmt: skip
