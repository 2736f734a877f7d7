"""Missing files, folders in place of files, and files that may not be read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prfl.data.video import read_video
from prfl.reward import PixelReward
from prfl.reward.checkpoint import RewardCard
from prfl.reward.pixel import PixelNetwork
from prfl.utils.video_size import VideoSize
from tests.faults.planting import fault
from tests.tiny import TEXT_WIDTH

HERE = "there is no such file"
SIZE = VideoSize(frames=5, height=16, width=16, fps=8.0)


def only(message: str) -> str:
    """A message about an absent file: nothing of permissions, and nothing of a damaged one."""
    for strange in ("let this user", "decoded", "again", "Errno", "No such file"):
        assert strange not in message, message
    return message


@fault("a prompt file that is not there", "trian.txt: " + HERE, "did you mean train.txt?")
def _(bench):
    return only(bench.cli("train", "sft.yaml", "data.prompts.train=trian.txt"))


@fault("a prompt file in a folder that is not there", "prompts/train.txt: " + HERE, "prompts is not there")
def _(bench):
    return only(bench.cli("train", "sft.yaml", "data.prompts.train=prompts/train.txt"))


@fault("a prompt file that is neither here nor beside the config", "data.prompts.train: " + HERE, ", nor conf/own.txt")
def _(bench):
    Path("conf").mkdir()
    Path("conf/sft.yaml").write_text(Path("sft.yaml").read_text().replace("train: train.txt", "train: own.txt"))
    return only(bench.cli("train", "conf/sft.yaml"))


@fault("a tracker that is not installed", "sft.yaml: training.trackers: wandb is not installed", "pip install wandb")
def _(bench):
    bench.patch.setattr("accelerate.tracking.get_available_trackers", list)
    return bench.cli("train", "sft.yaml", "training.trackers=[wandb]")


@fault("a manifest that is not there", "manifests.jsonl: " + HERE, "did you mean manifest.jsonl?")
def _(bench):
    return only(bench.cli("cache", "sft.yaml", "data.manifest=manifests.jsonl"))


@fault("a config that is not there", "stf.yaml: " + HERE, "did you mean sft.yaml?")
def _(bench):
    return only(bench.cli("train", "stf.yaml"))


@fault("a table of labels that is not there", "labels.csv: " + HERE, "name a file that is there")
def _(bench):
    return only(bench.cli("labels", "import", "labels.csv"))


@fault("a video that is not there, read from python", "absent.mp4: " + HERE, "name a video that is there")
def _(bench):
    return only(bench.call(read_video, Path("absent.mp4"), SIZE))


@fault("a folder in place of a video", "clips.mp4: is a folder, not a file", "name a video")
def _(bench):
    Path("clips.mp4").mkdir()
    return bench.call(read_video, Path("clips.mp4"), SIZE)


@fault("a folder in place of a manifest", "clips: is a folder, not a file", "name a file that is there")
def _(bench):
    return bench.cli("cache", "sft.yaml", "data.manifest=clips")


@fault("a folder in place of a config", "clips: is a folder, not a file", "give a config")
def _(bench):
    return bench.cli("train", "clips")


@fault("a file that this user may not read", "train.txt: cannot be read: Permission denied", "let this user read it")
def _(bench):
    with bench.patch.context() as patch:
        patch.setattr(Path, "read_bytes", refusing("train.txt", Path.read_bytes))
        return bench.fails(("train", "sft.yaml"))


def refusing(name: str, read: Callable) -> Callable:
    """Read as ``read`` does, but for files of this name, which the user may not read."""

    def reads(path: Path, *args: Any, **named: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path, *args, **named)

    return reads


@fault("a reward in a folder that is not there", "heads/latnet: there is no such folder", "did you mean heads/latent?")
def _(bench):
    return bench.cli("score", "clips/0.mp4", "--prompt", "a red circle", "--head", "heads/latnet")


@fault("latents that are not there", "latents.safetensors: " + HERE)
def _(bench):
    return only(bench.cli("score", "latents.safetensors", "--prompt", "a red circle", "--head", "heads/latent"))


@fault("a latent reward read as a pixel one", "not prfl-pixel-reward", "LatentReward.from_pretrained", "space: latent")
def _(bench):
    return bench.call(PixelReward.from_pretrained, "heads/latent")


@fault("a text for a number in a new reward's card", "card.fps.0: should be a valid number", "a value of that type")
def _(bench):
    card = RewardCard(fps=(8.0, 8.0))
    object.__setattr__(card, "fps", ("8", "8"))  # the types of arguments are checked in tests alone
    reward = PixelReward(PixelNetwork(TEXT_WIDTH, ["light"], hidden=8, inner=8), card=card)
    message = bench.call(reward.save_pretrained, "heads/new")
    assert "download" not in message and not Path("heads/new").exists()
    return message


@fault("a folder that is no pipeline", "holds no model_index.json", "give a diffusers pipeline folder or a hub id")
def _(bench):
    return bench.cli("train", "sft.yaml", "backbone.model=clips")


@fault("a model that is on no hub", "nobody/nothing: no folder here", "the hub id (owner/name)")
def _(bench):
    bench.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it waits 23 s where there is no network
    message = bench.cli("train", "sft.yaml", "backbone.model=nobody/nothing")
    assert "huggingface_hub" not in message and "cached files" not in message
    return message


@fault("a checkpoint's state that this user may not read", "state.json: cannot be read", "let this user read it")
def _(bench):
    bench.patch.setattr(Path, "read_text", refusing("state.json", Path.read_text))
    return bench.cli("train", "sft.yaml", "--resume", "runs/sft/checkpoints/step-000002")


@fault("several videos that cannot be scored", "2 of 3 files were not scored", "0.mp4: cannot be", "1.mp4: cannot be")
def _(bench):
    for name in ("0.mp4", "1.mp4"):
        Path("clips", name).write_bytes(b"no video")
    rows = [{"video": f"clips/{name}", "prompt": "a red circle"} for name in ("0.mp4", "1.mp4", "2.mp4")]
    Path("few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--head", "heads/latent", "--out", "cache/scores.csv", "--model", str(bench.model)]
    message = bench.cli("score", "few.jsonl", *options)
    return message[message.index("prfl score:") :]  # behind the libraries' own bars
