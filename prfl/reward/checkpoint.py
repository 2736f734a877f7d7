"""A saved reward is a folder of two files, ``config.json`` and ``reward.safetensors``; both are replaced atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prfl.backbone.fingerprint import NO_WEIGHTS
from prfl.backbone.weights import check_finite
from prfl.data.video_size import VideoSize
from prfl.reward.stored import AGAIN, StoredLatent, StoredPixel, config_hash, validated
from prfl.reward.stored import RewardCard as RewardCard
from prfl.utils.errors import PrflError
from prfl.utils.files import content_hash, read_tensors, replacing

CONFIG, WEIGHTS = "config.json", "reward.safetensors"
VERSION = 1
NOT_FINITE = "train the reward again with a lower learning rate, or take another"
LARGEST_CONFIG = 2**22  # bytes; the largest that prfl writes has a few thousand
FLOATS = ("F64", "F32", "F16", "BF16")
# Where a model came from is written down for the reader; whether it is the same model, its fingerprint tells.
PROVENANCE = ("model_id", "revision")

Shape = tuple[int, ...]
Content = TypeVar("Content", StoredLatent, StoredPixel)


def write_reward(folder: str | Path, kind: str, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Weights first, then the config that carries their hash: a crash between the two is noticed when loading."""
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {"format": f"prfl-{kind}", "version": VERSION, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    whole = {**header, "config_sha256": config_hash({**header, **config}), **config}
    for name, content in ((WEIGHTS, weights), (CONFIG, (json.dumps(whole, indent=2) + "\n").encode())):
        with replacing(Path(folder) / name) as path:
            path.write_bytes(content)


def kind_of(folder_or_hub: str | Path) -> str:
    """``latent-reward`` or ``pixel-reward``: what a saved reward is.  Raises PrflError where there is none."""
    return str(_read_json(_local(folder_or_hub, None)).get("format", "")).removeprefix("prfl-")


def read_config(folder_or_hub: str | Path) -> dict[str, Any]:
    """The config.json of a saved reward of either kind.  Raises PrflError where there is none that makes sense."""
    return find_reward(folder_or_hub).config.model_dump(mode="json")


def find_reward(folder_or_hub: str | Path) -> SavedReward[StoredPixel] | SavedReward[StoredLatent]:
    """A saved reward of either kind.  Raises PrflError where there is none that makes sense."""
    if kind_of(folder_or_hub) == StoredPixel.kind:
        return SavedReward.find(folder_or_hub, StoredPixel)
    return SavedReward.find(folder_or_hub, StoredLatent)


def saved_reward(folder_or_hub: str | Path) -> dict[str, Any]:
    """What makes a saved reward this one: the hash of its weights, its normalisation, and how its network is built."""
    config = read_config(folder_or_hub)
    built = json.dumps([config.get(name) for name in ("format", "blocks", "head", "adapter", "network")])
    return {
        "weights": str(config.get("weights_sha256"))[:16],
        "normalisation": config.get("normalisation"),
        "settings": hashlib.sha256(built.encode()).hexdigest()[:16],
    }


@dataclass(frozen=True)
class SavedReward(Generic[Content]):
    """A saved reward whose config makes sense; its weights are not read yet.

    edited: whether the config says other things than when it was saved.
    """

    folder: Path
    config: Content
    edited: bool

    @staticmethod
    def find(folder_or_hub: str | Path, kind: type[Content], revision: str | None = None) -> SavedReward[Content]:
        """Raises PrflError when it is absent, of another kind, or its config is malformed."""
        folder = _local(folder_or_hub, revision)
        config, where = _read_json(folder), str(folder / CONFIG)
        if (config.get("format"), config.get("version")) != (f"prfl-{kind.kind}", VERSION):
            what = f"it is {_short(config.get('format'))} version {_short(config.get('version'))}, not prfl-{kind.kind}"
            fix = "give a folder that this version's save_pretrained wrote"
            raise PrflError(f"{what} version {VERSION}", where=where, fix=fix)
        content = validated(kind, json.dumps(config), where)
        return SavedReward(folder, content, content.config_sha256 not in (None, config_hash(config)))

    def weights(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """The tensors, which have to be of these names and shapes: those that the config describes.

        Nothing but the file's header is read before that is known, so what is allocated is no larger than the file.
        Raises PrflError for a file that is absent, damaged, not the config's, or described by an edited config.
        """
        path = self._file()
        try:
            with safe_open(path, framework="pt") as opened:
                self._check_header(shapes, {name: opened.get_slice(name) for name in opened.keys()})
                tensors = {name: opened.get_tensor(name) for name in shapes}
        except SafetensorError as error:
            raise PrflError(f"is damaged: {error}", where=str(path), fix=AGAIN) from error
        check_finite(tensors, str(path), NOT_FINITE)
        return tensors

    def all_weights(self) -> dict[str, Tensor]:
        """Whatever the file holds.  Raises PrflError where it is absent, damaged, not the config's, or not finite."""
        path = self._file()
        tensors = read_tensors(path, AGAIN)
        check_finite(tensors, str(path), NOT_FINITE)
        return tensors

    def _file(self) -> Path:
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise PrflError(f"no {WEIGHTS} in it", where=str(self.folder), fix=AGAIN)
        if content_hash(path) != self.config.weights_sha256:
            what = f"{WEIGHTS} is not the file that {CONFIG} was written for"
            raise PrflError(what, where=str(self.folder), fix=AGAIN)
        return path

    def _check_header(self, shapes: Mapping[str, Shape], there: Mapping[str, Any]) -> None:
        for name in sorted(shapes.keys() | there.keys()):
            described = shapes.get(name)
            stored = tuple(there[name].get_shape()) if name in there else None
            if stored != described or there[name].get_dtype() not in FLOATS:
                kind = there[name].get_dtype() if name in there else ""
                raise PrflError(
                    f"the config and the weights do not describe one reward: {name} is {described or 'absent'} by the "
                    f"config, and {stored or 'absent'} {kind} in the file".rstrip(),
                    where=str(self.folder),
                    fix=AGAIN,
                )
        if self.edited:
            what = "was edited since the reward was saved: its hash is another one"
            raise PrflError(what, where=str(self.folder / CONFIG), fix=AGAIN)


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PrflError(f"no {CONFIG} in it", where=str(folder), fix="give a saved reward")
    if path.stat().st_size > LARGEST_CONFIG:
        raise PrflError(f"has {path.stat().st_size} bytes, which no config has", where=str(path), fix=AGAIN)
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


def check_clip(card: RewardCard, size: VideoSize, reward: str) -> None:
    """Raise PrflError where the videos to be scored are not like those that the reward was trained on.

    A reward sees speed by fps, and size by tokens.
    """
    for name, value in asdict(size).items():
        limits = getattr(card, name)
        if limits is not None and not limits[0] <= value <= limits[1]:
            trained = f"{limits[0]:g}" if limits[0] == limits[1] else f"{limits[0]:g} to {limits[1]:g}"
            what = f"{value:g}, but the reward at {reward} was trained on videos with {trained}"
            raise PrflError(
                what, where=f"data.{name}", fix=f"data.{name}: {limits[0]:g}, or train a reward for {value:g}"
            )


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
