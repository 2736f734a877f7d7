"""The spine's study on the shapes world: SFT, PRFL and VADER from the same base and labels for the same wall time.

    python bench/study_reward.py        first: it trains the two rewards
    python bench/study_spine.py [--seconds 180] [--out bench/results/spine.json]

1. Seconds per step and memory of each method; the seconds become a number of steps.
2. Each method's settings (learning rate and regulariser, three each) are tried with seed 0 for that time and compared
   on validation prompts, at the guidance that is best for the base there.
3. The best setting of each runs with three seeds; base and policies are drawn on the test prompts from the same noise,
   without guidance and at that scale.
4. With --hack STEPS, to its own file: a run that is meant to hack the reward, and the same with one regulariser each.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from bench import studies
from bench.harness import study_tables
from bench.harness.measure import restart_peak, status
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.evaluation import policy_eval
from prfl.evaluation.metrics import difference_interval, diversity_interval, mean_interval
from prfl.factory.backbone import build_backbone
from prfl.factory.data import build_dataset, fill_cache
from prfl.factory.evaluation import build_latents_scorer
from prfl.factory.objective import build_regulariser, build_reward_gradient, build_sft
from prfl.factory.policy import load_policy
from prfl.factory.prompts import load_prompts
from prfl.factory.reward import load_followed_reward, load_reward, reward_path
from prfl.objective import Objective
from prfl.runs import outcomes

RUNS = Path("runs/study-spine")
REWARDS = Path("runs/study-reward")
SAMPLES = 8  # of each prompt: 192 of 24 validation prompts, 256 of 32 test prompts
GUIDANCE = (1.5, 2.0, 3.0)
QUIET = ["evaluation.every=0", "evaluation.final_samples=0"]


@dataclass(frozen=True)
class Method:
    """config: the yaml file.  settings: overrides that are swept, the same number for every method."""

    config: str
    settings: tuple[tuple[str, ...], ...]
    always: tuple[str, ...] = ()


def settings(*values: tuple[float, str]) -> tuple[tuple[str, ...], ...]:
    """Return the overrides of each setting: a learning rate, and the regulariser's override."""
    return tuple((f"training.learning_rate={rate}", regulariser) for rate, regulariser in values)


MIXTURE = "data.generator={name: shapes_mixture, count: 6144}"  # all that the base was trained on
CURATED = "data.generator={name: shapes_curated, count: 2048}"
LATENT, PIXEL = (f"reward.path={REWARDS}/{name}-0/reward" for name in ("adapter", "pixel"))
FALLING = "training.schedule=cosine"
PAPERS = ("rollout.stride=1", "rollout.gradients_per_rollout=1")  # a whole rollout for every gradient
# Half the sampler's steps, at the guidance that the samples are drawn with: more updates in the same time.
STEER = (
    MIXTURE,
    FALLING,
    *PAPERS,
    "rollout.steps=10",
    "rollout.guidance={scale: 2, gradient: both}",
    "evaluation.steps=20",
)
WITHOUT, DECAY = "training.weight_decay=0", "training.weight_decay=0.1"
EACH, FOURTH = "objective.sft.every=1", "objective.sft.every=4"
SFT = settings((1e-4, WITHOUT), (5e-4, WITHOUT), (5e-4, DECAY))
STEERED = settings((1e-3, EACH), (3e-4, EACH), (3e-4, FOURTH))
METHODS = {
    "sft": Method("configs/tiny/sft.yaml", SFT, (MIXTURE, FALLING)),
    "sft, curated clips": Method("configs/tiny/sft.yaml", SFT, (CURATED, FALLING)),
    "prfl": Method("configs/tiny/prfl.yaml", STEERED, (*STEER, LATENT, "objective.steps_range=[0.3,1.0]")),
    # For those who sample without guidance; the setting that was best for prfl.
    "prfl, rolled out without guidance": Method(
        "configs/tiny/prfl.yaml", STEERED[:1], (MIXTURE, LATENT, FALLING, *PAPERS, "rollout.steps=20")
    ),
    "vader": Method("configs/tiny/vader.yaml", STEERED, (*STEER, PIXEL)),
    "vader, rolled out without guidance": Method(
        "configs/tiny/vader.yaml", STEERED[:1], (MIXTURE, PIXEL, FALLING, "rollout.steps=20")
    ),
}
HACK = {  # what is meant to hack, and the same with one regulariser each
    "hack": ("objective.sft=null", "data.generator=null"),
    "hack + SFT": (),
    "hack + distance": ("objective.sft=null", "data.generator=null", "objective.distance_weight=10"),
}
HACK_RATE = "training.learning_rate=2e-3"


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)


# ------------------------------------------------------------------------------- one process each, called by the study


def measure(config_file: Path, split: str, seed: int, guidance: float, out: Path) -> None:
    """Draw samples of a run's policy, or of the base where it has none, and score them by oracle and latent reward."""
    overrides = [f"run={out.parent}", f"evaluation.seed={seed}", f"evaluation.guidance_scale={guidance}"]
    config = load_config(config_file, [*overrides, "evaluation.judge=shapes", "evaluation.steps=20"])
    model = build_backbone(config)
    trained = (config.run / "policy.safetensors").exists()
    if trained:
        load_policy(config, model)
    adapter_path = REWARDS / "adapter-0/reward"  # of bench/study_reward.py, or else the one inside the package
    head = load_reward(adapter_path if adapter_path.exists() else reward_path("shapes"), model, "measure")
    reward = {"reward": build_latents_scorer(head, model)}
    prompts = load_prompts(config.data)[split]
    outcome = outcomes.outcome_of(config, model, reward, prompts, SAMPLES, "policy" if trained else "base")
    rows = {"prompts": outcome.prompts, "spread": outcome.spread}
    scores = {key: values.tolist() for key, values in outcome.scores.items()}
    policy_eval.write_results(out.with_suffix(""), [outcome], config.data.fps)
    out.write_text(json.dumps({**rows, "scores": scores}), encoding="utf-8")


def memory(config_file: str, overrides: list[str], out: Path) -> None:
    """Measure the bytes above the loaded baseline at the peak of a training step on the CPU, the regulariser's too."""
    config = load_config(config_file, overrides)
    objectives = objectives_of(config)
    restart_peak()
    before = status("VmRSS")
    for objective in objectives:
        objective.accumulate(0, list(range(config.training.batch)))
    out.write_text(json.dumps(status("VmHWM") - before), encoding="utf-8")


def objectives_of(config: Config) -> list[Objective]:
    """Build what a training step accumulates: the run's objective, and its regulariser's if there is one."""
    model = build_backbone(config)
    path = fill_cache(config, model, lambda items: items) if config.reads_clips else None
    clips = build_dataset(config, model, path, "train") if path else None
    if not config.follows_reward:
        assert clips is not None, "these configs make their clips, which SFT learns from"
        return [build_sft(config, model, clips)]
    extra = build_regulariser(config, model, clips)
    objective = build_reward_gradient(config, model, load_followed_reward(config, model), clips)
    return [objective, *([extra.objective] if extra else [])]


# ------------------------------------------------------------------------------------------------------------ the study


def measured(folder: Path, split: str, seed: int, guidance: float = 1.0, config: str | None = None) -> dict:
    """Return what ``measure`` wrote; it runs in its own process and only once."""
    out = folder / f"{split}-{seed}-{guidance:g}.json"
    if not out.exists():
        script = [__file__, "--measure", config or str(folder / "config.yaml"), split, str(seed), str(guidance)]
        studies.run([*script, str(out)], folder / "measure.txt")
    return json.loads(out.read_text(encoding="utf-8"))


def mean(measured_run: dict, key: str = "judge/all") -> float:
    return statistics.mean(measured_run["scores"][key])


def pace(name: str) -> tuple[float, int]:
    """Return the median seconds per step after the first three, and the peak bytes above the loaded baseline."""
    method = METHODS[name]
    overrides = [*method.always, *QUIET, "training.steps=15", "training.log_every=1"]
    folder = studies.train(RUNS / f"pace-{slug(name)}", method.config, overrides)
    seconds = statistics.median(r["seconds/step"] for r in studies.records(folder, "seconds/step")[3:])
    out = folder / "memory.json"
    if not out.exists():
        studies.run([__file__, "--memory", method.config, str(out), *method.always], folder / "memory.txt")
    return seconds, json.loads(out.read_text(encoding="utf-8"))


def study(seconds: float) -> dict:
    with studies.pool() as pool:
        costs = dict(zip(METHODS, pool.map(pace, METHODS), strict=True))
        steps = {name: max(10, round(seconds / each)) for name, (each, _) in costs.items()}

        def sweep(name: str, setting: tuple[str, ...]) -> dict:
            method = METHODS[name]
            overrides = [*method.always, *setting, *QUIET, f"training.steps={steps[name]}"]
            folder = RUNS / f"sweep-{slug(name)}-{slug('-'.join(setting))}"
            return measured(studies.train(folder, method.config, overrides), "validation", 0, best_scale)

        def guided(scale: float) -> dict:
            return measured(base_folder(), "validation", 0, scale, METHODS["sft"].config)

        scales = {scale: pool.submit(guided, scale) for scale in (1.0, *GUIDANCE)}
        guidance = {scale: mean(each.result()) for scale, each in scales.items()}
        best_scale = max(GUIDANCE, key=lambda scale: guidance[scale])
        swept = {
            (name, setting): pool.submit(sweep, name, setting) for name, m in METHODS.items() for setting in m.settings
        }
        validation = {key: mean(each.result()) for key, each in swept.items()}
        best = {name: best_setting(name, validation) for name in METHODS}

        def final(name: str, seed: int) -> Path:
            overrides = [*METHODS[name].always, *best[name], *QUIET, f"training.steps={steps[name]}", f"seed={seed}"]
            return studies.train(RUNS / f"final-{slug(name)}-{seed}", METHODS[name].config, overrides)

        def generator(name: str, scale: float, seed: int) -> dict:
            if name == "base":
                return measured(base_folder(), "test", seed, scale, METHODS["sft"].config)
            return measured(final(name, seed), "test", seed, scale)

        finals = [pool.submit(final, name, seed) for name in METHODS for seed in studies.SEEDS]
        for each in finals:  # the training comes first: two threads must not train one run twice
            each.result()
        rows = {}
        for name, scale in product(("base", *METHODS), (1.0, best_scale)):
            rows[name, scale] = [pool.submit(generator, name, scale, seed) for seed in studies.SEEDS]
        runs_of = {key: [each.result() for each in futures] for key, futures in rows.items()}
        return {
            "seconds": seconds,
            "cost": {
                name: {"seconds per step": s, "peak bytes above the loaded baseline": peak, "steps": steps[name]}
                for name, (s, peak) in costs.items()
            },
            "sweep": [
                {"method": n, "setting": list(s), "steps": steps[n], "validation": v}
                for (n, s), v in validation.items()
            ],
            "guidance on validation": guidance,
            "chosen": {name: list(setting) for name, setting in best.items()},
            "rows": [row(key, runs_of) for key in runs_of],
        }


def best_setting(name: str, validation: Mapping[tuple[str, tuple[str, ...]], float]) -> tuple[str, ...]:
    """Return a method's setting with the highest mean on validation prompts."""
    return max(METHODS[name].settings, key=lambda setting: validation[name, setting])


def hacking(steps: int) -> dict:
    """Train PRFL at a high rate for long: what oracle and trained reward do, with no regulariser and with each."""
    watch = [f"evaluation.every={steps // 5}", "evaluation.prompts_per_round=24", "evaluation.samples_per_prompt=4"]

    def hack(name: str) -> list[dict]:
        always = [*METHODS["prfl"].always, *HACK[name], HACK_RATE, *watch, "evaluation.final_samples=0"]
        folder = studies.train(RUNS / slug(name), METHODS["prfl"].config, [*always, f"training.steps={steps}"])
        return studies.rounds(folder, "judge/all")

    with studies.pool() as pool:
        curves = {name: pool.submit(hack, name) for name in HACK}
        return {"steps": steps, "curves": {name: curve.result() for name, curve in curves.items()}}


def base_folder() -> Path:
    folder = RUNS / "base"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tested(
    pool: ThreadPoolExecutor,
    folders: Mapping[tuple[str, int], Path],
    names: Sequence[str],
    seeds: Sequence[int] = studies.SEEDS,
) -> list[dict]:
    """Return the rows of the base and of finished runs, by (name, seed), on test prompts without guidance."""

    def drawn(name: str) -> list[dict]:
        if name == "base":
            base = METHODS["sft"].config
            return [measured(base_folder(), "test", seed, 1.0, base) for seed in seeds]
        return [measured(folders[name, seed], "test", seed) for seed in seeds]

    all_names = ("base", *names)
    runs_of = {(name, 1.0): runs for name, runs in zip(all_names, pool.map(drawn, all_names), strict=True)}
    return [row(key, runs_of) for key in runs_of]


def row(key: tuple[str, float], runs_of: dict[tuple[str, float], list[dict]]) -> dict:
    """Compute means over seeds and paired differences (same prompt, same noise); intervals are over prompts."""
    runs = runs_of[key]
    prompts = [prompt for run in runs for prompt in run["prompts"]]

    def column(which: tuple[str, float], score: str) -> torch.Tensor:
        return torch.tensor([value for run in runs_of[which] for value in run["scores"][score]])

    result: dict = {"generator": key[0], "guidance": key[1], "seeds": len(runs), "samples": len(prompts)}
    result["mean"] = {score: vars(mean_interval(column(key, score), prompts)) for score in runs[0]["scores"]}
    result["diversity"] = vars(
        diversity_interval({p: statistics.mean(run["spread"][p] for run in runs) for p in runs[0]["spread"]})
    )
    result["right per seed"] = [mean(run) for run in runs]
    result["right, less that of"] = {
        f"{other[0]}, guidance {other[1]:g}": vars(
            difference_interval(column(key, "judge/all"), column(other, "judge/all"), prompts)
        )
        for other in runs_of
        if other != key
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180, help="training time of every run")
    parser.add_argument("--hack", type=int, metavar="STEPS", help="only the runs that are meant to hack the reward")
    parser.add_argument("--out", type=Path, help="default: bench/results/spine.json, or hacking.json beside it")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of a results file")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs="+", help=argparse.SUPPRESS)

    options = parser.parse_args()
    if options.measure:
        config, split, seed, guidance, out = options.measure
        measure(Path(config), split, int(seed), float(guidance), Path(out))
    elif options.memory:
        config, out, *overrides = options.memory
        memory(config, overrides, Path(out))
    elif options.table:
        print(study_tables.of_files("spine", options.table))
    elif options.hack:
        studies.write(options.out or Path("bench/results/hacking.json"), hacking(options.hack))
    else:
        studies.write(options.out or Path("bench/results/spine.json"), study(options.seconds))


if __name__ == "__main__":
    main()
