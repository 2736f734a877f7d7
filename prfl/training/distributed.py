"""The processes of a training: accelerate's device placement, process group and trackers (see utils/processes.py)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator, tracking
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from prfl.training.run_folder import RunFolder
from prfl.utils import processes
from prfl.utils.errors import PrflError


def make_accelerator(
    run: RunFolder, device: str = "auto", trackers: Sequence[str] = ("tensorboard",), timeout: float = 1800.0
) -> Accelerator:
    """Make accelerate's device placement and process group, which knows the names of the trackers (trackers.py).

    device: auto | cpu | cuda.
    timeout: seconds that a process waits for the others, before it takes them for dead.
    Raises PrflError where processes were started together that accelerate would let run each for itself, and for a
    tracker that is not installed.
    """
    processes.check_environment()
    installed = [str(name) for name in tracking.get_available_trackers()]
    if missing := [name for name in trackers if name not in installed]:
        what, fix = f"{missing[0]} is not installed", f"pip install {missing[0]}, or leave it out"
        raise PrflError(what, where="training.trackers", fix=fix)
    project = ProjectConfiguration(project_dir=str(run.path), logging_dir=str(run.path))
    # Left to itself, accelerate makes no process group where torchrun started several processes and there is no GPU.
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # backbone.dtype says what is computed in, and not accelerate's own settings
        log_with=list(trackers) or None,
        project_config=project,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        raise PrflError(
            f"{started} processes were started, and accelerate makes {accelerator.num_processes} of them",
            where="WORLD_SIZE",
            fix="start them with torchrun or accelerate launch, with one GPU for each, or backbone.device: cpu",
        )
    return accelerator
