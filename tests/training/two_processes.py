"""What each of two processes does for test_processes.py: the same commands as one process, under torchrun's variables.

python -m tests.training.two_processes FOLDER PORT

imports once what both need, and forks them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import yaml

from prfl import cli
from prfl.backbone.wan.model import WanBackbone
from prfl.data.cache import LatentCache
from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import write_video
from prfl.evaluation import plots, policy_eval, reward_eval
from prfl.runs import stage, steer, train_policy  # noqa: F401  (the stage: imported before the forks)
from prfl.utils import processes, rng
from tests import few_levels, pictures

PROMPTS = {
    "train": ["a red circle", "a blue square", "a triangle"],
    "validation": ["a green circle", "a circle moves up", "a square moves"],
    "test": ["a red square"],
}
STAGES = {"reward": 2, "prfl": 4, "full": 2}  # and their steps
UNWATCHED = ("evaluation.every=0", "evaluation.final_samples=0")


def write_project(pipeline: Path) -> None:
    """Into the current folder: prompts, clips of which some lack a label, and a config for each stage."""
    for split, prompts in PROMPTS.items():
        Path(f"{split}.txt").write_text("\n".join(prompts) + "\n")
    rows = []
    for split in ("train", "validation"):
        for prompt in PROMPTS[split]:
            for index in range(3):
                path = Path(f"clips/{split}-{prompt.replace(' ', '-')}-{index}.mp4")
                noise = rng.normal((3, 5, 16, 16), 0, prompt, 0, [index])[0]
                write_video(path, (0.3 * noise + (0.5 if index % 2 else -0.5)).clamp(-1, 1), 8)
                label = {"light": float(index % 2)} | ({"calm": float(index < 1)} if index < 2 else {})
                rows.append(LabelledVideo(path, prompt, label, split))
    write_manifest(Path("manifest.jsonl"), rows)
    model = {"model": str(pipeline)}
    reward = {"space": "latent", "path": "runs/one-reward/reward", "shape": "linear"}
    own = {
        "reward": {
            "backbone": model,
            "reward": {
                "space": "latent",
                "head": {"dimensions": ["light", "calm"], "blocks": [1], "inner": 8, "hidden": 8},
            },
            "objective": {"name": "preference", "loss": "bce"},
            "evaluation": {"every": 2},
        },
        "prfl": {
            "backbone": {**model, "adapter": {"rank": 2, "alpha": 2}},
            "reward": reward,
            "objective": {"name": "prfl", "sft": {"every": 1}, "distance_weight": 0.1},
            "rollout": {"steps": 3, "gradients_per_rollout": 3},  # a run is broken off after two of the three
            "evaluation": {"every": 4, "prompts_per_round": 3, "final_samples": 1},
            "training": {"steps": 4},
        },
        "full": {
            "backbone": {**model, "train": "full"},
            "data": {"manifest": None},
            "reward": reward,
            "objective": {"name": "prfl"},
            "evaluation": {"every": 0},
        },
    }
    data = {"manifest": "manifest.jsonl", "prompts": {split: f"{split}.txt" for split in PROMPTS}}
    data |= {"frames": 5, "height": 16, "width": 16, "fps": 8}
    training = {"steps": 2, "batch": 3, "learning_rate": 1e-3, "trackers": [], "ema_decay": 0.5}
    for name, config in own.items():
        whole = {"version": 1, "seed": 0, "rollout": {"steps": 3}, **config}
        whole["data"] = data | config.get("data", {})
        whole["training"] = training | config.get("training", {})
        Path(f"{name}.yaml").write_text(yaml.safe_dump(whole))


def train(name: str, run: str, *overrides: str) -> str:
    """Train a stage; returns what went to the standard error.  run: its folder is runs/RUN, its cache is its own."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = cli.main(["train", f"{name}.yaml", f"run=runs/{run}", f"data.cache=cache-{run}", *overrides])
    assert code in (0, 2), f"{name} ended with {code}: {error.getvalue()}"
    return error.getvalue()[error.getvalue().find("prfl") :] if code else ""


def draw(run: str) -> None:
    """Draw plain videos with a policy's run, and steered ones."""
    overrides = [f"run=runs/{run}", f"data.cache=cache-{run}", *UNWATCHED]
    for options in ([], ["--best-of", "2", "--decide-at", "0.5"]):
        assert cli.main(["sample", "prfl.yaml", *overrides, *options]) == 0


def everything(rank: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    facts: dict = {"encoded": {}, "sampled": {}}
    counts: Counter = Counter()
    encode, sample, build = WanBackbone.encode, policy_eval.sample, train_policy.build_reward_gradient

    def counted_encode(self, pixels):
        counts["encoded"] += len(pixels)
        return encode(self, pixels)

    def counted_sample(backbone, prompts, *others, **more):
        counts["sampled"] += len(prompts)
        return sample(backbone, prompts, *others, **more)

    record = steer.write_record

    def counted_record(*given):
        counts["steered"] += 1
        return record(*given)

    keep = LatentCache.keep

    def counted_keep(self, prompt, condition):
        counts["prompts"] += 1
        return keep(self, prompt, condition)

    processes.end = lambda: None  # one command after another in the same process
    WanBackbone.encode, policy_eval.sample, LatentCache.keep = counted_encode, counted_sample, counted_keep
    steer.write_record = counted_record
    for name in STAGES:
        counts.clear()
        assert not train(name, f"two-{name}")
        facts[name] = dict(counts)
    assert not train("prfl", "mixed-two-one", "training.steps=2", *UNWATCHED)
    assert not train("prfl", "mixed-one-two", *UNWATCHED)

    counts.clear()
    draw("two-prfl")
    facts["drawn"] = dict(counts)

    def other_weights(*given):
        objective = build(*given)
        for parameter in objective.parameters().values():
            parameter.data += rank
        return objective

    train_policy.build_reward_gradient = other_weights
    facts["other weights"] = train("prfl", "other-weights", *UNWATCHED)

    def killed(*given):
        objective = build(*given)
        accumulate = objective.accumulate

        def once(step, indices):
            if rank == 1 and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return accumulate(step, indices)

        objective.accumulate = once
        return objective

    train_policy.build_reward_gradient = killed
    Path(f"facts-{rank}.json").write_text(json.dumps(facts))
    facts["killed"] = train("prfl", "killed", "training.save_every=1", *UNWATCHED)
    Path(f"facts-{rank}.json").write_text(json.dumps(facts))


def fork(rank: int, port: str) -> int:
    """Start one of the two; what it writes goes to output-RANK.txt."""
    child = os.fork()
    if child:
        return child
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    output = os.open(f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        everything(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    plots.png, reward_eval.levels = pictures.blank, few_levels.few
    children = [fork(rank, sys.argv[2]) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path("codes.json").write_text(json.dumps(codes))
