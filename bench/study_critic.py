"""A frozen vision-language model as the critic, against rewards that are trained on labels, for the same CPU time.

    python bench/study_critic.py [--seconds 120] [--seeds 3] [--out bench/results/critic.json]

1. Latent head and pixel reward are trained from the same labelled samples of the base; the critics need none.
2. CPU seconds a step and memory of each way; the seconds become a number of steps.
3. Each way is followed with three seeds from the same base, without clips; base and policy are drawn on 192 test
   samples from the same noise.  A reward that was not followed watches.  The latent head is followed for as many steps
   as the critic, too, which takes it a quarter of the time.
4. The critic is examined against the oracle: on rendered clips, on the base's samples and on those of its own policies.

The result is written anew behind every run, with the seeds that are there; a finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import studies
from bench.study_first_run import spread
from bench.study_spine import slug
from prfl.config import load_config
from prfl.factory.backbone import build_backbone, policy_adapter_name
from prfl.factory.evaluation import sampling_settings
from prfl.factory.policy import load_policy
from prfl.factory.prompts import load_prompts
from prfl.reward.critic import load_critic
from prfl.rollout import sampling
from prfl.toy import critic_recipe
from prfl.toy.clips import CLIP, critic_folder
from prfl.toy.questions import all_questions

RUNS = Path("runs/study-critic")
QUIET = ["evaluation.every=0", "evaluation.final_samples=0"]
COMMON = [
    "data.generator=null", "objective.sft=null", "rollout.steps=10",
    "rollout.stride=1", "rollout.gradients_per_rollout=1", "training.batch=16", "training.learning_rate=1e-3",
    "training.warmup=5", "training.schedule=cosine", "evaluation.every=0", "evaluation.steps=20",
    "evaluation.final_samples=192",
]  # fmt: skip
LABELLED = {"latent": "configs/tiny/reward.yaml", "pixel": "configs/tiny/pixel_reward.yaml"}
HEAD_WATCHES = "evaluation.held_out_reward=shapes"
CRITIC_WATCHES = "evaluation.held_out_critic={model: shapes, questions: shapes, frames: 4, dtype: float32}"
CRITIC = "configs/tiny/diffusion_drf.yaml"
WAYS = {
    "critic, yes or no": (CRITIC, [HEAD_WATCHES, "reward.critic.questions=shapes"]),
    "critic, free answers": (CRITIC, [HEAD_WATCHES, "reward.critic.questions=shapes-answers"]),
    "latent head": ("configs/tiny/prfl.yaml", [CRITIC_WATCHES, f"reward.path={RUNS}/latent/reward"]),
    "pixel reward": (
        "configs/tiny/vader.yaml", [HEAD_WATCHES, f"reward.path={RUNS}/pixel/reward", "objective.last_steps=8"]
    ),
}  # fmt: skip
WAYS["latent head, the critic's steps"] = WAYS["latent head"]
AS_LONG = {"latent head, the critic's steps": ("latent head", "critic, yes or no")}  # costs as one, steps of the other
MEASURES = ("judge/all", *(f"judge/{name}" for name in studies.DIMENSIONS), "measured/size", "diversity",
            "held_out/total", "reward/total")  # fmt: skip
EXAMINED = 4  # samples of each of 48 test and validation captions


# ------------------------------------------------------------------------------- one process each, called by the study


def examine(config_file: Path, trained: bool, out: Path) -> None:
    """Compare the critic's answers with the oracle's on samples of a run's policy, or of its base."""
    config = load_config(config_file, [f"run={out.parent}"])
    model = build_backbone(config)
    if trained:
        load_policy(config, model)
    prompts = [prompt for name in ("validation", "test") for prompt in load_prompts(config.data)[name][:24]]
    drawn = sampling.sample(
        model, *sampling.jobs(prompts, EXAMINED), sampling_settings(config),
        adapter=policy_adapter_name(config) if trained else None,
    )  # fmt: skip
    out.write_text(json.dumps(marks(sampling.decode_all(model, drawn))), encoding="utf-8")


def marks(pixels: torch.Tensor) -> dict[str, float]:
    critic = load_critic(str(critic_folder()), all_questions(), critic_recipe.FRAMES, clip=CLIP)
    return {kind: round(share, 4) for kind, share in critic_recipe.examined(critic, pixels).items()}


# ------------------------------------------------------------------------------------------------------------ the study


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cost(name: str) -> dict[str, float]:
    """Measure the CPU seconds of a step, by a run of eight steps less one of two, and the peak of a step's memory."""
    out = RUNS / f"cost-{slug(name)}.json"
    if not out.exists():
        config, overrides = WAYS[name]
        used = []
        for steps in (2, 8):
            folder = RUNS / f"cost-{slug(name)}-{steps}"
            shutil.rmtree(folder, ignore_errors=True)  # a finished run would not be run again, and cost nothing
            before = cpu_seconds()
            changes = [*COMMON, *QUIET, *overrides[1:], f"training.steps={steps}", "training.warmup=1"]
            studies.train(folder, config, changes)
            used.append(cpu_seconds() - before)
        script = ["bench/study_spine.py", "--memory", config, str(RUNS / f"memory-{slug(name)}.json"), *COMMON]
        studies.run([*script, *overrides[1:]], RUNS / "memory.txt")
        peak = json.loads((RUNS / f"memory-{slug(name)}.json").read_text(encoding="utf-8"))
        costs = {"CPU seconds per step": (used[1] - used[0]) / 6, "peak bytes above the loaded baseline": peak}
        out.write_text(json.dumps(costs), encoding="utf-8")
    return json.loads(out.read_text(encoding="utf-8"))


def followed(name: str, seed: int, steps: int) -> Path:
    config, overrides = WAYS[name]
    changes = [*COMMON, *overrides, f"training.steps={steps}", f"seed={seed}", f"evaluation.seed={seed}"]
    return studies.train(RUNS / f"{slug(name)}-{seed}", config, changes)


def examined(folder: Path, trained: bool) -> dict[str, float]:
    out = folder / f"examined-{'policy' if trained else 'base'}.json"
    if not out.exists():
        config = folder / "config.yaml" if trained else Path(CRITIC)
        folder.mkdir(parents=True, exist_ok=True)
        studies.run([__file__, "--examine", str(config), str(int(trained)), str(out)], folder / "examine.txt")
    return json.loads(out.read_text(encoding="utf-8"))


def study(seconds: float, seeds: int, ways: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the result behind every run that adds to it."""
    accuracy = {
        "rendered clips": marks(torch.cat([critic_recipe.rendered(9000, index, 32) for index in range(8)])),
        "the base's samples": examined(RUNS / "base", trained=False),
    }
    result: dict[str, Any] = {
        "seconds": seconds, "overrides": COMMON, "cost": {}, "accuracy": accuracy, "runs": {}, "over the seeds": {},
    }  # fmt: skip
    yield result
    for seed in range(seeds):
        for name in ways:
            measured, timed = AS_LONG.get(name, (name, name))
            if (kind := {"latent head": "latent", "pixel reward": "pixel"}.get(measured)) is not None:
                studies.train(RUNS / kind, LABELLED[kind], [])
            each = result["cost"][name] = cost(measured)
            each["steps"] = steps = max(10, round(seconds / cost(timed)["CPU seconds per step"]))
            folder = followed(name, seed, steps)
            runs = result["runs"].setdefault(name, {})
            runs[str(seed)] = studies.outcome(folder, MEASURES)
            if name.startswith("critic"):
                accuracy[f"samples of {name}, seed {seed}"] = examined(folder, trained=True)
            if len(runs) > 1:
                result["over the seeds"][name] = {
                    measure: spread(runs, measure) for measure in runs["0"]["measures"]
                }  # fmt: skip
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="CPU time of the training of every run")
    parser.add_argument("--seeds", type=int, default=3, help="0: only the critic's accuracy")
    parser.add_argument("--only", action="append", choices=WAYS, help="of the ways; repeatable; default: all")
    parser.add_argument("--out", type=Path, default=Path("bench/results/critic.json"))
    parser.add_argument("--examine", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine:
        config, trained, out = options.examine
        return examine(Path(config), bool(int(trained)), Path(out))
    os.environ["OMP_NUM_THREADS"] = "1"
    for result in study(options.seconds, options.seeds, options.only or list(WAYS)):
        studies.write(options.out, result)


if __name__ == "__main__":
    main()
