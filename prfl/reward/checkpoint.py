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
from prfl.config.section import is_hub_id
from prfl.reward.checkpoint_schema import AGAIN, StoredLatent, StoredPixel, config_hash, validated
from prfl.reward.checkpoint_schema import RewardCard as RewardCard
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write, read_tensors
from prfl.utils.hashing import content_hash, json_hash
from prfl.utils.hub import hub_error
from prfl.utils.reading import absent, unreadable
from prfl.utils.video_size import VideoSize

CONFIG, WEIGHTS = "config.json", "reward.safetensors"
VERSION = 1
READERS = {"prfl-latent-reward": "LatentReward", "prfl-pixel-reward": "PixelReward"}  # by format
NOT_FINITE = "train the reward again with a lower learning rate, or take another"
LARGEST_CONFIG = 2**22  # bytes; the largest that prfl writes has a few thousand
FLOATS = ("F64", "F32", "F16", "BF16")
# Where a model came from is written down for the reader; whether it is the same model, its fingerprint tells.
PROVENANCE = ("model_id", "revision")

Shape = tuple[int, ...]
Content = TypeVar("Content", StoredLatent, StoredPixel)


def write_reward(folder: str | Path, kind: str, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
    """Write the weights, then the config that carries their hash: a crash between the two is noticed when loading.

    Raises PrflError, and writes nothing, for a config that could not be read again: a card with a text for a number.
    """
    weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    header = {"format": f"prfl-{kind}", "version": VERSION, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    stored = StoredPixel if kind == StoredPixel.kind else StoredLatent
    try:
        whole = {**header, "config_sha256": config_hash({**header, **config}), **config}
        validated(stored, json.dumps(whole), f"the reward for {folder}", fix="build it with a value of that type")
    except TypeError as error:  # a tensor, say, which json does not write
        fix = "build it with plain numbers, texts and lists"
        raise PrflError(f"cannot be saved: {error}", where=f"the reward for {folder}", fix=fix) from error

    with atomic_write(Path(folder) / WEIGHTS) as path:
        path.write_bytes(weights)
    rewrite_config(folder, whole)


def rewrite_config(folder: str | Path, config: Mapping[str, object]) -> None:
    """Write a config.json whose weights stay as they are, with the hash of what it says now."""
    whole = {**config, "config_sha256": config_hash(config)}
    with atomic_write(Path(folder) / CONFIG) as path:
        path.write_bytes((json.dumps(whole, indent=2) + "\n").encode())


def kind_of(folder_or_hub: str | Path) -> str:
    """Tell which kind a saved reward is: ``latent-reward`` or ``pixel-reward``.  Raises PrflError where none is."""
    config = _read_json(_local(folder_or_hub, None))
    return str(config.get("format", "")).removeprefix("prfl-")


def read_config(folder_or_hub: str | Path) -> dict[str, Any]:
    """Read the config.json of a saved reward of either kind.  Raises PrflError where there is none that makes sense."""
    return find_reward(folder_or_hub).config.model_dump(mode="json")


def find_reward(folder_or_hub: str | Path) -> SavedReward[StoredPixel] | SavedReward[StoredLatent]:
    """Find a saved reward of either kind.  Raises PrflError where there is none that makes sense."""
    if kind_of(folder_or_hub) == StoredPixel.kind:
        return SavedReward.find(folder_or_hub, StoredPixel)
    return SavedReward.find(folder_or_hub, StoredLatent)


def saved_reward(folder_or_hub: str | Path) -> dict[str, Any]:
    """Identify a saved reward: the hash of its weights, its normalisation, and the hash of its network's settings."""
    config = read_config(folder_or_hub)
    settings = [config.get(name) for name in ("format", "blocks", "head", "adapter", "network")]
    return {
        "weights": str(config.get("weights_sha256"))[:16],
        "normalisation": config.get("normalisation"),
        "settings": json_hash(settings, sort_keys=False)[:16],
    }


@dataclass(frozen=True)
class SavedReward(Generic[Content]):
    """A saved reward whose config makes sense; its weights are not read yet.

    edited: whether the config was changed since it was saved.
    """

    folder: Path
    config: Content
    edited: bool

    @staticmethod
    def find(folder_or_hub: str | Path, kind: type[Content], revision: str | None = None) -> SavedReward[Content]:
        """Read and check the config.  Raises PrflError when it is absent, of another kind, or malformed."""
        folder = _local(folder_or_hub, revision)
        config, where = _read_json(folder), str(folder / CONFIG)

        form, version = config.get("format"), config.get("version")
        if (form, version) != (f"prfl-{kind.kind}", VERSION):
            fix = "give a folder that this version's save_pretrained wrote"
            if isinstance(form, str) and form in READERS and version == VERSION:
                fix = f"load it with {READERS[form]}.from_pretrained; in a config, reward.space: {form.split('-')[1]}"
            what = f"it is {_short(form)} version {_short(version)}, not prfl-{kind.kind} version {VERSION}"
            raise PrflError(what, where=where, fix=fix)

        content = validated(kind, json.dumps(config), where)
        edited = content.config_sha256 not in (None, config_hash(config))
        return SavedReward(folder, content, edited)

    def weights(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Read the tensors, which must have these names and shapes: those that the config describes.

        Nothing but the file's header is read before that is known, so what is allocated is no larger than the file.
        Raises PrflError for a file that is absent, damaged, not the config's, or described by an edited config.
        """
        path = self._file()
        try:
            with safe_open(path, framework="pt") as file:
                self._check_header(shapes, {name: file.get_slice(name) for name in file.keys()})
                tensors = {name: file.get_tensor(name) for name in shapes}
        except OSError as error:
            raise unreadable(path, error, AGAIN) from error
        except SafetensorError as error:
            raise PrflError(f"is damaged: {error}", where=str(path), fix=AGAIN) from error
        check_finite(tensors, str(path), NOT_FINITE)
        return tensors

    def all_weights(self) -> dict[str, Tensor]:
        """Read all that the file holds, finite.  Raises PrflError where it is absent, damaged or not the config's."""
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

    def _check_header(self, shapes: Mapping[str, Shape], header: Mapping[str, Any]) -> None:
        """Raise PrflError unless the file holds float tensors of just these shapes, and the config is as saved.

        header: safetensors' slices, by name; none of their data is read.
        """
        for name in sorted(shapes.keys() | header.keys()):
            described = shapes.get(name)
            stored = tuple(header[name].get_shape()) if name in header else None
            if stored != described or header[name].get_dtype() not in FLOATS:
                dtype = header[name].get_dtype() if name in header else ""
                raise PrflError(
                    f"the config and the weights do not describe one reward: {name} is {described or 'absent'} by the "
                    f"config, and {stored or 'absent'} {dtype} in the file".rstrip(),
                    where=str(self.folder),
                    fix=AGAIN,
                )

        if self.edited:
            what = "was edited since the reward was saved: its hash is another one"
            raise PrflError(what, where=str(self.folder / CONFIG), fix=f"undo the edit, or {AGAIN}")


def shapes_of(module: nn.Module) -> dict[str, Shape]:
    """List the shapes of a module's parameters and buffers, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _read_json(folder: Path) -> dict[str, Any]:
    """Parse the config.json in ``folder``.  Raises PrflError unless it is a JSON object of a plausible size."""
    path = folder / CONFIG
    if not path.is_file():
        raise PrflError(f"no {CONFIG} in it", where=str(folder), fix="give a saved reward")
    if path.stat().st_size > LARGEST_CONFIG:
        raise PrflError(f"has {path.stat().st_size} bytes, which no config has", where=str(path), fix=AGAIN)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise PrflError(f"is not JSON: {error}", where=str(path), fix=AGAIN) from error
    if not isinstance(config, dict):
        raise PrflError(f"is a {type(config).__name__}, not an object", where=str(path), fix=AGAIN)
    return config


def _local(folder_or_hub: str | Path, revision: str | None) -> Path:
    """Return the folder of a saved reward; one of the hub is downloaded first.  Raises PrflError where none is."""
    folder = Path(folder_or_hub)
    if folder.is_dir():
        return folder
    if folder.parent.is_dir() and folder.parent != Path():  # runs/x/reward is no repository of somebody's
        raise absent(folder, "let `prfl train` make it first", "folder")
    try:
        return Path(snapshot_download(str(folder_or_hub), revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        if is_hub_id(folder_or_hub):
            raise hub_error(str(folder_or_hub), error, "saved reward") from error
        raise absent(folder, "give the folder of a saved reward, or its hub id, owner/name", "folder") from error


def check_fit(trained_on: Mapping[str, object], backbone: Mapping[str, object], where: str) -> None:
    """Raise PrflError listing every entry of the backbone's description that differs, provenance apart.

    A model on ``meta`` has no weights to compare; the rest of its description still must fit.
    """
    backbone = json.loads(json.dumps(backbone))  # tuples become lists, as they did in the file

    differences = []
    for name in {**trained_on, **backbone}:
        saved, loaded = trained_on.get(name), backbone.get(name)
        if name not in PROVENANCE and loaded not in (saved, NO_WEIGHTS):
            differences.append(f"{name}: {_short(saved)} there, {_short(loaded)} here")

    if differences:
        revision = trained_on.get("revision")
        of_revision = f" (revision {revision})" if revision else ""
        raise PrflError(
            f"the reward does not fit this backbone ({backbone.get('model_id')}): " + "; ".join(differences),
            where=where,
            fix=f"load {trained_on.get('model_id')}{of_revision}, or train a reward here",
        )


def check_clip(card: RewardCard, size: VideoSize, reward: str) -> None:
    """Raise PrflError where the videos to be scored are not like those that the reward was trained on.

    A reward sees speed by fps, and size by tokens.
    """
    for name, value in asdict(size).items():
        trained = getattr(card, name)
        if trained is None:
            continue
        low, high = trained
        if not low <= value <= high:
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            what = f"{value:g}, but the reward at {reward} was trained on videos with {span}"
            fix = f"data.{name}: {low:g}, or train a reward for {value:g}"
            raise PrflError(what, where=f"data.{name}", fix=fix)


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
