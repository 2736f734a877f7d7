"""Remedies that fit the cause: the disk, a command's option, the machine's settings."""

from __future__ import annotations

import errno
import math
import os
import pwd
from pathlib import Path

from prfl.backbone.wan.model import WanBackbone
from tests.faults.planting import fault


def on_writing(number: int):
    """A command that is refused by the disk as it gives a new file its name."""

    def plant(bench):
        def refuses(*_):
            raise OSError(number, os.strerror(number))

        bench.patch.setattr("prfl.utils.files.os.replace", refuses)
        message = bench.cli("schema", "schema.json")
        assert (number == errno.ENOSPC) == ("free some space" in message)
        return message

    return plant


for number, reason, remedy in (
    (errno.ENOSPC, "No space left", "GiB are free there"),
    (errno.EDQUOT, "quota", "free some of your quota"),
    (errno.EACCES, "Permission denied", "let this user write there"),
    (errno.EROFS, "Read-only", "a disk that can be written to"),
    (errno.EIO, "Input/output error", "see the system's log"),
    (errno.ESTALE, "Stale", "mount it again"),
    (errno.EMFILE, "Too many open files", "ulimit -n"),
    (errno.EFBIG, "File too large", "takes files of this size"),
    (errno.EBUSY, "busy", "end the program that uses it"),
):
    fault(f"the disk says: {os.strerror(number)}", "schema.json: cannot be written", reason, remedy)(on_writing(number))


@fault("a file's name that is too long", "cannot be written: File name too long", "give it a shorter name")
def _(bench):
    return bench.cli("schema", "a" * 300 + ".json")


@fault("a folder in place of a file", "cannot be written", "a folder has this name")
def _(bench):
    return bench.cli("schema", "clips")


@fault("a file in place of a folder", "cannot be written", "a file stands where a folder is needed")
def _(bench):
    return bench.cli("schema", "manifest.jsonl/schema.json")


def scored(bench, *options: str) -> str:
    return bench.cli("score", "clips/0.mp4", "--prompt", "a red circle", "--head", "heads/latent", *options)


@fault("a score of fewer frames than none", "--frames: no clip has frames -3", "1 or more; without --frames")
def _(bench):
    return scored(bench, "--frames", "-3")


@fault("a score at no frames a second", "--fps: no clip has fps 0", "a number above 0; without --fps")
def _(bench):
    return scored(bench, "--fps", "0")


@fault("a score at fps that is no number", "--fps: no clip has fps nan")
def _(bench):
    return scored(bench, "--fps", "nan")


@fault("a score of no height", "--height: no clip has height 0")
def _(bench):
    return scored(bench, "--height", "0")


@fault("a score on a GPU that is not there", "--device: no GPU is usable here", "--device auto")
def _(bench):
    bench.patch.setattr("torch.cuda.is_available", lambda: False)
    return scored(bench, "--model", str(bench.model), "--device", "cuda")


def rated(bench, scale: str) -> str:
    Path("ratings.csv").write_text("video,prompt,motion\nclips/0.mp4,a red circle,1\n", encoding="utf-8")
    return bench.cli("labels", "import", "ratings.csv", "--scale", scale)


@fault("a scale without an end", "--scale: 0 to inf is no scale", "worst:best, as 1:5")
def _(bench):
    return rated(bench, "0:inf")


@fault("a scale of no number", "--scale: nan to 5 is no scale")
def _(bench):
    return rated(bench, "nan:5")


@fault("a run in the home of nobody", "command line: run: there is no home folder for ~nobody-here", "whole path")
def _(bench):
    return bench.cli("train", "sft.yaml", "run=~nobody-here/x")


@fault("a home folder that nobody knows", "command line: data.cache: there is no home folder for ~;", "whole path")
def _(bench):
    def unknown(_):
        raise KeyError

    bench.patch.delenv("HOME", raising=False)
    bench.patch.setattr(pwd, "getpwuid", unknown)
    return bench.cli("train", "sft.yaml", "data.cache=~/cache")


@fault("a key of a run's own config", "runs/sft/config.yaml: evaluation.final_samples: there are no samples")
def _(bench):
    return bench.cli("eval", "--run", "runs/sft")


@fault("latents that are not finite in the first step", "in step 0", "float32 (backbone.dtype)", leaves=("runs/new",))
def _(bench):
    velocity = WanBackbone.velocity
    bench.patch.setattr(
        WanBackbone, "velocity", lambda self, x, *args: velocity(self, x, *args) * (math.nan, 1)[len(x) == 1]
    )
    message = bench.cli("train", "prfl.yaml", "run=runs/new")
    assert "learning rate" not in message
    return message


def with_environment(**settings: str):
    def plant(bench):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            bench.patch.delenv(name, raising=False)
        for name, value in settings.items():
            bench.patch.setenv(name, value)
        return bench.cli("train", "sft.yaml", "run=runs/new")

    return plant


fault("DeepSpeed left over in the environment", "ACCELERATE_USE_DEEPSPEED: asks accelerate", "unset it")(
    with_environment(ACCELERATE_USE_DEEPSPEED="true")
)
fault("FSDP left over in the environment", "ACCELERATE_USE_FSDP: asks accelerate", "unset it")(
    with_environment(ACCELERATE_USE_FSDP="1")
)
fault("another device in the environment", "ACCELERATE_TORCH_DEVICE: asks", "backbone.device", "unset it")(
    with_environment(ACCELERATE_TORCH_DEVICE="cuda:1")
)
fault("a rank without a world", "RANK: set, and LOCAL_RANK, WORLD_SIZE, MASTER_ADDR", "unset RANK, or start")(
    with_environment(RANK="0")
)
fault("a local rank without a world", "LOCAL_RANK: set, and RANK, WORLD_SIZE", "unset LOCAL_RANK, or start")(
    with_environment(LOCAL_RANK="0")
)
fault("a world that is no number", "WORLD_SIZE: is 'two', not a number")(with_environment(WORLD_SIZE="two"))
