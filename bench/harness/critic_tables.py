"""The tables of bench/study_critic.py: what a critic teaches beside trained rewards, and what it knows itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.studies import DIMENSIONS, interval

Table = tuple[Sequence[str], list[list[str]]]
Result = Mapping[str, Any]


def critic(result: Result) -> Table:
    """Write what every way gains over the base, by seed, and what a step of it costs."""
    body = []
    for name, by_seed in result["runs"].items():
        runs, cost = list(by_seed.values()), result["cost"][name]
        size, watched = (_mean(runs, measure, "difference") for measure in ("measured/size", "held_out/total"))
        body.append([
            name, f"{_mean(runs, 'judge/all', 'base'):.3f}", f"{_mean(runs, 'judge/all', 'policy'):.3f}",
            f"{_mean(runs, 'judge/all', 'difference'):+.3f}",
            *(interval(run["measures"]["judge/all"]["difference"], "+") for run in runs),
            f"{cost['steps']}", f"{cost['CPU seconds per step']:.1f}",
            f"{cost['peak bytes above the loaded baseline'] / 1e6:.0f}", f"{size:+.3f}", f"{watched:+.2f}",
        ])  # fmt: skip
    seeds = [f"seed {seed}" for seed in max(result["runs"].values(), key=len)]
    costs = ["steps", "CPU s a step", "MB", "size", "watching reward"]
    return ["followed", "base", "policy", "gain", *seeds, *costs], body


def critic_accuracy(result: Result) -> Table:
    """Write how often the critic's answers are the oracle's, by what is asked and of which videos."""
    body = [
        [f"{videos}: {asked}", *(f"{shares[f'{kind}/{dimension}']:.2f}" for dimension in DIMENSIONS)]
        for videos, shares in result["accuracy"].items()
        for kind, asked in (("free", "a word"), ("yes or no", "yes or no"))
    ]
    return ["videos, and what is asked for", *DIMENSIONS], body


def _mean(runs: Sequence[Result], measure: str, part: str) -> float:
    values = [run["measures"][measure][part] for run in runs]
    return sum(value["value"] if isinstance(value, Mapping) else value for value in values) / len(values)
