"""A saved reward is a folder of two files, ``config.json`` and ``reward.safetensors``; both are replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prfl.backbone.fingerprint import NO_WEIGHTS
from prfl.backbone.weights import check_finite
from prfl.data.files import replacing
from prfl.errors import PrflError

CONFIG, WEIGHTS = "config.json", "reward.safetensors"
VERSION = 1
AGAIN = "save or download the reward again"
# Where a model came from is written down for the reader; whether it is the same model, its fingerprint tells.
PROVENANCE = ("model_id", "revision")


@dataclass(frozen=True)
class RewardCard:
    """What a person should know before using a saved reward.

    labels: what label 1 means, per dimension.  Ranges are (lowest, highest) of the training videos.
    accuracy: per dimension, held-out pairwise accuracy within a prompt by sigma bin, e.g. {"motion": {"0.0-0.2": 0.9}}.
    """

    labels: dict[str, str] = field(default_factory=dict)
    frames: tuple[int, int] | None = None
    fps: tuple[float, float] | None = None
    height: tuple[int, int] | None = None
    width: tuple[int, int] | None = None
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def from_json(stored: Mapping[str, Any]) -> RewardCard:
        ranges = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
        return RewardCard(**{**stored, **ranges})


def write_reward(folder: str | Path, kind: str, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Weights first, then the config that carries their hash: a crash between the two is noticed when loading."""
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {"format": f"prfl-{kind}", "version": VERSION, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    for name, content in ((WEIGHTS, weights), (CONFIG, (json.dumps({**header, **config}, indent=2) + "\n").encode())):
        with replacing(Path(folder) / name) as path:
            path.write_bytes(content)


def read_config(folder_or_hub: str | Path) -> dict[str, Any]:
    """The config.json of a saved reward of either kind.  Raises PrflError where there is none."""
    return _read_config(_local(folder_or_hub, None))


def kind_of(folder_or_hub: str | Path) -> str:
    """``latent-reward`` or ``pixel-reward``: what a saved reward is.  Raises PrflError where there is none."""
    return str(read_config(folder_or_hub).get("format", "")).removeprefix("prfl-")


def saved_reward(folder_or_hub: str | Path) -> dict[str, Any]:
    """What makes a saved reward this one: the hash of its weights, its normalisation, and how its network is built."""
    config = read_config(folder_or_hub)
    built = json.dumps([config.get(name) for name in ("format", "blocks", "head", "adapter", "network")])
    return {
        "weights": str(config.get("weights_sha256"))[:16],
        "normalisation": config.get("normalisation"),
        "settings": hashlib.sha256(built.encode()).hexdigest()[:16],
    }


def read_reward(folder_or_hub: str | Path, kind: str, revision: str | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The config and the tensors of a saved reward.  Raises PrflError when it is absent, broken or of another kind."""
    folder = _local(folder_or_hub, revision)
    config = _read_config(folder)
    if (config.get("format"), config.get("version")) != (f"prfl-{kind}", VERSION):
        raise PrflError(
            f"it is {config.get('format')} version {config.get('version')}, not prfl-{kind} version {VERSION}",
            where=str(folder / CONFIG),
            fix="give a folder that this version's save_pretrained wrote",
        )
    if not (folder / WEIGHTS).is_file():
        raise PrflError(f"no {WEIGHTS} in it", where=str(folder), fix=AGAIN)
    weights = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != config.get("weights_sha256"):
        raise PrflError(f"{WEIGHTS} is not the file that {CONFIG} was written for", where=str(folder), fix=AGAIN)
    try:
        tensors = load(weights)
    except SafetensorError as error:
        raise PrflError(f"is damaged: {error}", where=str(folder / WEIGHTS), fix=AGAIN) from error
    check_finite(tensors, str(folder / WEIGHTS), "train the reward again with a lower learning rate, or take another")
    return config, tensors


@contextmanager
def describing(folder_or_hub: str | Path) -> Iterator[None]:
    """Around building a reward from its stored config and tensors: what does not fit together is a PrflError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, PrflError):
            raise
        reason = " ".join(str(error).split("\n")[:2])
        what = f"the config and the weights do not describe one reward ({type(error).__name__}: {reason})"
        raise PrflError(what, where=str(folder_or_hub), fix=AGAIN) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PrflError(f"no {CONFIG} in it", where=str(folder), fix="give a saved reward")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PrflError(f"is not JSON: {error}", where=str(path), fix=AGAIN) from error
    if not isinstance(config, dict):
        raise PrflError(f"is a {type(config).__name__}, not an object", where=str(path), fix=AGAIN)
    return config


def _local(folder_or_hub: str | Path, revision: str | None) -> Path:
    folder = Path(folder_or_hub)
    if folder.is_dir():
        return folder
    if folder.parent.is_dir() and folder.parent != Path():  # runs/x/reward is no repository of somebody's
        fix = "let `prfl train` make it first; the folder that it is in is there"
        raise PrflError("there is no such folder", where=str(folder), fix=fix)
    try:
        return Path(snapshot_download(str(folder_or_hub), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise PrflError(
            f"neither a folder nor a repository that can be read ({type(error).__name__})",
            where=str(folder_or_hub),
            fix="give the folder that save_pretrained wrote, or owner/name of a repository on the hub",
        ) from error


def check_fit(trained_on: Mapping[str, object], given: Mapping[str, object], where: str) -> None:
    """Raise PrflError listing every entry of the backbone's description that differs, provenance apart.

    A model on ``meta`` has no weights to compare; the rest of its description still must fit.
    """
    given = json.loads(json.dumps(given))  # tuples become lists, as they did in the file
    names = [name for name in {**trained_on, **given} if name not in PROVENANCE]
    wrong = [
        f"{name}: {_short(trained_on.get(name))} there, {_short(given.get(name))} here"
        for name in names
        if trained_on.get(name) != given.get(name) and given.get(name) != NO_WEIGHTS
    ]
    if wrong:
        raise PrflError(
            f"the reward does not fit this backbone ({given.get('model_id')}): " + "; ".join(wrong),
            where=where,
            fix=f"load {trained_on.get('model_id')} (revision {trained_on.get('revision')}), or train a reward here",
        )


def check_clip(card: RewardCard, clip: Mapping[str, int | float], reward: str) -> None:
    """Raise PrflError where the videos to be scored are not like those that the reward was trained on.

    clip: frames, fps, height and width; a reward sees speed by fps, and size by tokens.
    """
    for name, given in clip.items():
        known = getattr(card, name)
        if known is not None and not known[0] <= given <= known[1]:
            trained = f"{known[0]:g}" if known[0] == known[1] else f"{known[0]:g} to {known[1]:g}"
            what = f"{given:g}, but the reward at {reward} was trained on videos with {trained}"
            raise PrflError(
                what, where=f"data.{name}", fix=f"data.{name}: {known[0]:g}, or train a reward for {given:g}"
            )


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
