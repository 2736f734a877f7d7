"""Do two checkouts compute the same?  Bit for bit: every objective, a resumed checkpoint and a loaded reward.

    git worktree add /tmp/before COMMIT
    python bench/same_numbers.py /tmp/before . [--work /tmp/same-numbers]

Each checkout trains every objective of the shapes world for three steps, through the command line.  The new one then
resumes the old one's checkpoints for three steps more, and scores and follows the rewards that the old one saved.  All
tensors that are written, all metrics but times and memory, and all scores must be equal on the same machine.  Commands
that ran before are not run again, so ``--work`` can keep the old checkout's results.  Exit 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from prfl.utils.metrics_file import records

PROMPTS = {
    "train": ["a cyan circle moves down quickly", "a red bar moves up slowly", "a yellow circle moves up quickly"],
    "validation": ["a purple circle moves left slowly", "a red triangle moves left slowly"],
    "test": ["a cyan circle moves down slowly"],
}
NOT_COMPARED = ("seconds/", "peak_gib")  # metrics that no two runs share
SMALL = [
    "data.prompts={train: train.txt, validation: validation.txt, test: test.txt}", "data.cache=cache",
    "training.steps=3", "training.batch=2", "training.save_every=3", "training.log_every=1", "training.trackers=[]",
    "evaluation.every=0",
]  # fmt: skip
CLIPS = ["data.generator={name: shapes_samples, per_prompt: 4, held_out_per_prompt: 4, other_captions: 3, steps: 4}"]
POLICY = [*SMALL, "evaluation.final_samples=0", "data.generator={name: shapes_mixture, count: 8}"]
LATENT = [*POLICY, "rollout.steps=8", "reward.path=shapes"]
# Each: config, overrides.  The rewards come first: the others follow them.
RUNS: dict[str, tuple[str, list[str]]] = {
    "reward": ("reward", [*SMALL, *CLIPS]),
    "pixel_reward": ("pixel_reward", [*SMALL, *CLIPS]),
    "sft": ("sft", POLICY),
    "vader": ("vader", [*POLICY, "rollout.steps=8", "reward.path=OLD/runs/pixel_reward/reward"]),
    "saved_reward": ("prfl", [*LATENT, "reward.path=OLD/runs/reward/reward"]),
    **{
        method: (method, LATENT)
        for method in (
            "prfl", "refl", "dense_process", "leapalign", "alignprop", "draft_k", "draft_lv", "drtune", "full_chain",
            "instructvideo",
        )
    },
    "prfl_exact": ("prfl", [*LATENT, "rollout.stride=1", "rollout.gradients_per_rollout=1",
                            "objective={name: prfl, handoff: clean, distance_weight: 0.1, sft: {every: 2}}"]),
    "prfl_sde": ("prfl", [*LATENT, "rollout.stride=1", "rollout.gradients_per_rollout=1", "rollout.solver=flow_sde",
                          "rollout.guidance={scale: 2.0, gradient: cond}"]),
    "drtune_unipc": ("drtune", [*LATENT, "rollout.solver=unipc"]),
    "vader_checkpointed": ("draft_k", [*LATENT, "backbone.checkpointing=full", "backbone.adapter.dropout=0.1"]),
}  # fmt: skip
RESUMED = ("sft", "prfl", "reward")


def command(tree: Path, folder: Path, *arguments: str) -> str:
    """Run a ``prfl`` command of a checkout, in a folder; returns its standard output.  Raises CalledProcessError."""
    paths = os.pathsep.join(str(path) for path in (tree, tree / "kernels"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "prfl.cli", *arguments],
        cwd=folder,
        env=environment,
        encoding="utf-8",
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"{tree}: prfl {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def train(tree: Path, folder: Path, run: str, old: Path, *more: str) -> None:
    config, overrides = RUNS[run]
    overrides = [each.replace("OLD", str(old)) for each in (*overrides, *more)]
    command(tree, folder, "train", str(tree / "configs/tiny" / f"{config}.yaml"), f"run=runs/{run}", *overrides)


def run_all(tree: Path, folder: Path, old: Path) -> None:
    """Run every run of a checkout that is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, prompts in PROMPTS.items():
        (folder / f"{split}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    for run in RUNS:
        finished = folder / "runs" / run / "finished"  # the report is there before
        if not finished.exists():
            train(tree, folder, run, old)
            finished.touch()
            print(f"{tree}: {run}", flush=True)


def resume(tree: Path, old: Path, folder: Path) -> None:
    """Copy the old checkout's runs and their cache, and train them for three steps more."""
    if not (folder / "resumed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        for run in RESUMED:
            train(tree, folder, run, old, "training.steps=6")
            print(f"{tree}: resumed {run}", flush=True)
        (folder / "resumed").touch()


def scores(tree: Path, old: Path) -> str:
    """Score generated clips with a checkout's ``prfl score``, by both rewards that the old one saved."""
    clips = sorted(str(path) for path in old.glob("cache/**/*.mp4"))[:4]
    heads = [str(old / "runs" / run / "reward") for run in ("reward", "pixel_reward")]
    return "".join(
        command(tree, old, "score", *clips, "--prompt", PROMPTS["train"][0], "--head", head) for head in heads
    )


def metrics(file: Path) -> list[dict]:
    """Read the rows without times and memory, those of an older version by today's names."""
    rows, damaged = records(file)
    assert not damaged, f"{file}: {damaged} damaged lines"
    return [{key: value for key, value in row.items() if not any(n in key for n in NOT_COMPARED)} for row in rows]


def differences(old: Path, new: Path) -> list[str]:
    """List the files under ``runs`` that are not equal, or are in one folder only."""
    files = {path.relative_to(folder) for folder in (old, new) for path in (folder / "runs").rglob("*")}
    wrong = []
    for file in sorted(path for path in files if path.suffix == ".safetensors" or path.name == "metrics.jsonl"):
        if not ((old / file).exists() and (new / file).exists()):
            wrong.append(f"{file}: only in one of them")
        elif file.name == "metrics.jsonl":
            for before, after in zip(metrics(old / file), metrics(new / file), strict=True):
                changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
                wrong += [f"{file}: step {before.get('step')}: {', '.join(changed)}"] if changed else []
        else:
            before, after = load_file(old / file), load_file(new / file)
            if before.keys() != after.keys() or not all(torch.equal(before[key], after[key]) for key in before):
                wrong.append(f"{file}: tensors differ")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/same-numbers"))
    options = parser.parse_args()
    old_tree, new_tree, work = options.old.resolve(), options.new.resolve(), options.work.resolve()

    old, new = work / "old", work / "new"
    for folder in (new, work / "new-resumed"):
        shutil.rmtree(folder, ignore_errors=True)

    run_all(old_tree, old, old)
    resume(old_tree, old, work / "old-resumed")
    run_all(new_tree, new, old)
    resume(new_tree, old, work / "new-resumed")

    wrong = differences(old, new) + differences(work / "old-resumed", work / "new-resumed")
    if scores(old_tree, old) != scores(new_tree, old):
        wrong.append("prfl score says something else")
    print("\n".join(wrong) or f"{len(RUNS)} runs, {len(RESUMED)} resumed, 2 rewards loaded: equal bit for bit")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
