"""The spine's study on the shapes world: SFT, PRFL and VADER from the same base and labels for the same wall time.

    python bench/study_spine.py [--seconds 120] [--out bench/results/spine.json]

1. Each method's settings are tried with seed 0 for the same time and compared on validation prompts.
2. The best setting of each runs with three seeds; base and policy are drawn on the test prompts from the same noise.

Runs go two at a time on one thread each; a run whose results are there is not run again, so a stopped study goes on.
Seconds per step are measured beforehand, two at a time as well, and turned into a number of steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from prfl.data.files import replacing
from prfl.evaluation.metrics import difference_interval, mean_interval

RUNS = Path("runs/spine")
SEEDS = (0, 1, 2)
TEST_SAMPLES = 256  # 32 prompts, 8 each
WATCH = ["evaluation.prompts_per_round=24", "evaluation.samples_per_prompt=8"]
CURATED = "data.generator={name: shapes_curated, count: 2048}"


@dataclass(frozen=True)
class Method:
    """config: the yaml file.  settings: overrides that are swept, the same number for every method."""

    config: str
    settings: tuple[tuple[str, ...], ...]
    always: tuple[str, ...] = ()


def rates(*values: float) -> tuple[tuple[str, ...], ...]:
    return tuple((f"training.learning_rate={value}",) for value in values)


METHODS = {
    "sft": Method("configs/tiny/sft.yaml", rates(1e-4, 3e-4, 1e-3)),
    "sft, curated clips": Method("configs/tiny/sft.yaml", rates(1e-4, 3e-4, 1e-3), (CURATED,)),
    "prfl": Method("configs/tiny/prfl.yaml", rates(2e-4, 5e-4, 1e-3)),
    "vader": Method("configs/tiny/vader.yaml", rates(2e-4, 5e-4, 1e-3)),
}
HACK = ("objective.sft=null", "data.generator=null", "training.learning_rate=2e-3")


def train(name: str, config: str, overrides: list[str]) -> Path:
    """One run of ``prfl train`` on one thread; its folder.  Skipped where it has finished."""
    folder = RUNS / name
    if (folder / "report.html").exists():
        return folder
    command = [sys.executable, "-m", "prfl.cli", "train", config, f"run={folder}", *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "console.txt", "a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    print(f"[{time.strftime('%H:%M:%S')}] {name}", flush=True)
    return folder


def records(folder: Path, key: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def seconds_per_step(folder: Path) -> float:
    """Median over the steps after the first three."""
    return float(torch.tensor([record["seconds/step"] for record in records(folder, "seconds/step")][3:]).median())


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


def study(seconds: float) -> dict:
    """Trials for the time per step, the sweep on validation prompts, and three seeds of the best on test prompts."""
    with ThreadPoolExecutor(2) as pool:
        quiet = ["evaluation.every=0", "evaluation.final_samples=0"]
        trials = {
            name: pool.submit(train, f"time-{slug(name)}", method.config, [*method.always, *quiet, "training.steps=12"])
            for name, method in METHODS.items()
        }
        pace = {name: seconds_per_step(trial.result()) for name, trial in trials.items()}
        steps = {name: max(10, round(seconds / each)) for name, each in pace.items()}

        def sweep(name: str, setting: tuple[str, ...]) -> Path:
            watch = [*WATCH, f"evaluation.every={steps[name]}", "evaluation.final_samples=0"]
            overrides = [*METHODS[name].always, *setting, *watch, f"training.steps={steps[name]}"]
            return train(f"sweep-{slug(name)}-{slug('-'.join(setting))}", METHODS[name].config, overrides)

        swept = {
            (name, setting): pool.submit(sweep, name, setting)
            for name, method in METHODS.items()
            for setting in method.settings
        }
        validation = {key: records(run.result(), "judge/all")[-1]["judge/all"] for key, run in swept.items()}
        best = {
            name: max(method.settings, key=lambda s, name=name: validation[name, s]) for name, method in METHODS.items()
        }

        def final(name: str, seed: int) -> Path:
            overrides = [*METHODS[name].always, *best[name], f"training.steps={steps[name]}", f"seed={seed}"]
            overrides += ["evaluation.every=0", f"evaluation.final_samples={TEST_SAMPLES}"]
            return train(f"final-{slug(name)}-{seed}", METHODS[name].config, overrides)

        finals = {(name, seed): pool.submit(final, name, seed) for name in METHODS for seed in SEEDS}
        hacked = pool.submit(
            train,
            "hack",
            METHODS["prfl"].config,
            [*HACK, f"training.steps={2 * steps['prfl']}", f"evaluation.final_samples={TEST_SAMPLES}",
             f"evaluation.every={max(1, steps['prfl'] // 4)}"],
        )  # fmt: skip
        folders = {key: run.result() for key, run in finals.items()} | {("prfl, meant to hack", 0): hacked.result()}
    sweeps = [
        {"method": name, "setting": list(setting), "validation": value} for (name, setting), value in validation.items()
    ]
    return {
        "seconds": seconds,
        "seconds_per_step": pace,
        "steps": steps,
        "sweep": sweeps,
        "chosen": {name: list(setting) for name, setting in best.items()},
        "rows": rows(folders),
    }


def rows(folders: dict[tuple[str, int], Path]) -> list[dict]:
    """One row a method: mean over seeds, and the paired difference to the base with an interval over prompts."""
    found = []
    for name in dict.fromkeys(name for name, _ in folders):
        runs = [
            json.loads((f / "samples/final/results.json").read_text()) for (n, _), f in folders.items() if n == name
        ]
        prompts = [row["prompt"] for run in runs for row in run["rows"]]
        table = {
            which: {
                key: torch.tensor([row[which][key] for run in runs for row in run["rows"]])
                for key in runs[0]["rows"][0][which]
            }
            for which in ("base", "policy")
        }
        row: dict = {"method": name, "seeds": len(runs), "samples": len(prompts)}
        for key, values in table["policy"].items():
            row[key] = vars(mean_interval(values, prompts))
            row[f"{key} - base"] = vars(difference_interval(values, table["base"][key], prompts))
        row["diversity"] = [run["outcomes"]["policy"]["summary"]["diversity"]["value"] for run in runs]
        row["diversity of the base"] = [run["outcomes"]["base"]["summary"]["diversity"]["value"] for run in runs]
        row["per seed"] = [float(torch.tensor([r["policy"]["judge/all"] for r in run["rows"]]).mean()) for run in runs]
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="training time of every run")
    parser.add_argument("--out", type=Path, default=Path("bench/results/spine.json"))
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {
        "command": "python " + " ".join(sys.argv),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "commit": commit,
        "weights": "the shapes world's trained base (prfl/data/shapes/model)",
    }
    result = {**facts, **study(options.seconds)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(options.out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
