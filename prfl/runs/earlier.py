"""Results of an earlier training in a run folder: put aside, never lost, before another training makes its own.

    earlier-000020-1a2b3c4d/policy.safetensors, config.yaml, samples/final, ...      (finished steps, run's identity)

So what lies in the run folder is of the training that the folder's config and checkpoints are of, or is not there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from prfl.backbone.family import FIRST_NETWORKS
from prfl.config import identity, load_config
from prfl.config.schema import Config
from prfl.factory.provenance import read_stamp
from prfl.training.checkpoint import list_checkpoints
from prfl.utils.console import console
from prfl.utils.errors import PrflError
from prfl.utils.files import disk_errors

WEIGHTS = ("policy.safetensors", *FIRST_NETWORKS, "reward")
# What is made of the final weights; pages for people to label (samples/label-*) are not: their labels are work.
OF_THE_END = (
    "policy.safetensors",
    "transformer*",
    "unet",
    "reward",
    "reward_eval*",
    "report.html",
    "export",
    "samples/final",
    "samples/sampled",
    "samples/steered-*",
)
OF_THE_START = ("config.yaml", "environment.json")
ON_THE_WAY = (*OF_THE_START, "metrics.jsonl", "samples/step-*", "best", "failed", "trackers", "checkpoints")


def set_aside(config: Config, step: int, anew: bool) -> Path | None:
    """Move an earlier training's results into a folder of their own, and say so; returns it, None where there are none.

    anew: the run starts at step 0 and all that the earlier one left goes, or else it goes on from its step and what it
    left at its end.  Raises PrflError where the folder cannot be written to.
    """
    run = config.run

    # Which results there are.
    weights = [run / name for name in WEIGHTS if (run / name).exists()]
    checkpoints = list_checkpoints(run / "checkpoints")
    if not weights and not (anew and (checkpoints or _of_another_config(config))):
        return None
    if checkpoints and anew:
        step = int(checkpoints[-1].name.removeprefix("step-"))
    names = (*OF_THE_END, *ON_THE_WAY) if anew else OF_THE_END
    results = [path for name in names for path in sorted(run.glob(name))]
    if not results:
        return None

    folder = _folder(run, weights, step)
    with disk_errors(folder):
        for path in results:
            target = folder / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)
        if not anew and (run / "config.yaml").is_file():  # so that it can be sampled and exported where it is
            shutil.copyfile(run / "config.yaml", folder / "config.yaml")
    console.say(f"results of an earlier training are put aside: {folder}")
    return folder


def _of_another_config(config: Config) -> bool:
    """Return whether the run folder's config is not this one."""
    path = config.run / "config.yaml"
    if not path.is_file():
        return False
    try:
        return identity(load_config(path)) != identity(config)
    except PrflError:  # of an older version, or not ours
        return True


def _folder(run: Path, weights: list[Path], step: int) -> Path:
    """Name a new folder after the step at which the weights were made, and the identity of their run."""
    stamp = None
    try:
        stamp = read_stamp(weights[0]) if weights else None
    except PrflError:  # damaged: it is put aside all the same
        pass
    end, made_by = (stamp or {}).get("end", step), (stamp or {}).get("run", "")[:8] or "unknown"
    folder, number = run / f"earlier-{end:06d}-{made_by}", 1
    while folder.exists():
        number += 1
        folder = run / f"earlier-{end:06d}-{made_by}-{number}"
    return folder
