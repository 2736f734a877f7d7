"""What made a result of training: written into its file, and compared where it is read.

    policy.safetensors                        metadata "prfl": a JSON object (safetensors keeps no order among several)
    transformer/prfl.json, reward/prfl.json   the same object

``weights`` is a hash of the tensors, ``files`` has one of each file, ``step`` is that of the weights, ``end`` the steps
that the run had finished when it wrote them (another, where the best round is kept), ``run`` the hash of the run's
identity as its checkpoints have it; ``family``, ``networks`` (that predict), ``base`` (their fingerprints), ``vae`` and
``settings`` tell the model, ``rank``, ``alpha`` and ``targets`` the adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl.backbone import Backbone
from prfl.backbone.fingerprint import NO_WEIGHTS
from prfl.backbone.lora_file import RUN_STAMP
from prfl.backbone.network import fingerprints
from prfl.config import identity
from prfl.config.schema import Config
from prfl.training.checkpoint import list_checkpoints, read_facts
from prfl.utils.console import warn
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.hashing import remembered_hash
from prfl.utils.reading import disk_refuses, unreadable

KEY, BESIDE = RUN_STAMP, "prfl.json"
AGAIN = "run `prfl train` on this config again"
Stamp = Mapping[str, Any]


class _Shape(BaseModel):
    """What a stamp must look like; any of it may be absent."""

    model_config = ConfigDict(extra="allow", strict=True)
    step: int = 0
    end: int = 0
    run: str = ""
    files: dict[str, str] = {}
    family: str = "wan"
    networks: list[Annotated[str, Field(pattern=r"^\w+$")]] = Field(default=["transformer"], min_length=1)


@dataclass(frozen=True)
class Moment:
    """When a run wrote a result: the step of its weights, the run's finished steps, the hash of the run's identity."""

    step: int
    end: int
    run: str


def stamp_of(config: Config, model: Backbone, moment: Moment | None) -> Stamp:
    """Return the facts that are written beside a policy.  moment: None if no run trained it."""
    return base_of(model) | _adapter(config) | (asdict(moment) if moment else {})


def base_of(model: Backbone) -> dict[str, Any]:
    facts = model.facts
    *networks, vae = fingerprints(model).values()
    told = {"family": facts.family, "networks": list(facts.blocks), "model": facts.identity["model_id"]}
    return told | {"base": " ".join(networks), "vae": vae, "settings": facts.settings}


def family(stamp: Stamp) -> str:
    """The family of the model that a result is of.  Older stamps name none: there was one then."""
    return stamp.get("family", "wan")


def networks(stamp: Stamp | None) -> list[str]:
    """The networks that a policy trains, by name, the first of them first.  Older stamps name none: there was one."""
    return (stamp or {}).get("networks", ["transformer"])


def _adapter(config: Config) -> dict[str, Any]:
    lora = config.backbone.adapter
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)} if lora else {}


def metadata(stamp: Stamp) -> dict[str, str]:
    """Of a safetensors file."""
    return {KEY: json.dumps(stamp, sort_keys=True)}


def write_beside(folder: Path, stamp: Stamp, written: Sequence[Path]) -> None:
    """prfl.json in a folder of weights.  written: its other files."""
    files = {file.name: remembered_hash(file) for file in written}
    with atomic_write(folder / BESIDE) as temporary:
        temporary.write_text(json.dumps({**stamp, "files": files}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_place(config: Path) -> None:
    """Take out of a diffusers config where the base lay: a folder of this machine is nobody's business."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    with atomic_write(config) as temporary:
        temporary.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, shapes, types and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        plain = tensors[name].contiguous()
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_stamp(path: Path) -> Stamp | None:
    """Of a policy's file or folder, or of a reward's folder; None where it has none: an older prfl wrote it.

    Raises PrflError where it cannot be read.
    """
    try:
        if path.is_dir():
            file = path / BESIDE
            text = file.read_text(encoding="utf-8") if file.is_file() else None
        else:
            with safe_open(path, framework="pt") as opened:
                text = (opened.metadata() or {}).get(KEY)
        return None if text is None else _Shape.model_validate_json(text).model_dump(exclude_unset=True)
    except (ValidationError, UnicodeDecodeError) as error:
        raise PrflError("is damaged: what made it cannot be read", where=str(path), fix=AGAIN) from error
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error, AGAIN) from error
        raise PrflError(f"is damaged: {error}", where=str(path), fix=AGAIN) from error


def check_stamp(path: Path, config: Config, model: Backbone | None) -> Stamp | None:
    """``read_stamp``, compared with the config and the model that the policy is to be used with.

    Raises PrflError where they are others than it was trained with.  model: None where only the file is read.
    """
    stamp = read_stamp(path)
    if stamp is None:
        warn(f"{path} is of an older prfl and does not say what made it; that it fits is not checked")
        return None
    for key, ours in _adapter(config).items():
        if stamp.get(key, ours) != ours:
            theirs, asked = (f"{value:g}" if isinstance(value, float) else value for value in (stamp[key], ours))
            raise PrflError(
                f"it was trained with {key} {theirs}, and the config says {asked}",
                where=str(path),
                fix=f"put backbone.adapter.{key} back to {theirs}, or train again",
            )
    if model is not None:
        check_base(path, stamp, base_of(model))
    _check_files(path, stamp)
    return stamp


def check_base(path: Path, stamp: Stamp, ours: Stamp) -> None:
    for key, what in (("base", "transformer"), ("vae", "VAE"), ("settings", "settings of transformer or VAE")):
        theirs = stamp.get(key, ours[key])
        if theirs != ours[key] and not any(NO_WEIGHTS in str(hashes) for hashes in (theirs, ours[key])):
            raise PrflError(
                f"it was trained from another model than {ours['model']}: another {what} ({theirs}, not {ours[key]})",
                where=str(path),
                fix=f"set backbone.model to the model that it was trained from ({stamp.get('model')}), as it was then",
            )


def check_weights(path: Path, stamp: Stamp | None, tensors: Mapping[str, Tensor]) -> None:
    """Raise PrflError where the tensors of a policy's file are not those that it was written with."""
    if stamp and stamp.get("weights", "") not in ("", tensors_hash(tensors)):
        raise PrflError("is damaged: its weights are not as they were written", where=str(path), fix=AGAIN)


def _check_files(folder: Path, stamp: Stamp) -> None:
    for name, digest in stamp.get("files", {}).items():
        file = folder / name
        if not file.is_file() or remembered_hash(file) != digest:
            what = "is not as it was written" if file.is_file() else "is missing"
            raise PrflError(what, where=str(file), fix=AGAIN)


def _last(run: Path) -> Mapping[str, Any] | None:
    """What the newest checkpoint of a run says of itself; None where there is none, or a damaged one: resuming has its
    own words for it."""
    checkpoints = list_checkpoints(run / "checkpoints")
    try:
        return read_facts(checkpoints[-1]) if checkpoints else None
    except PrflError:
        return None


def run_hash(run: Path, now: str) -> str:
    """The hash of a run's identity as its checkpoints have it; ``now`` where there is none yet.

    Another version of prfl may name other facts of the same run: what its checkpoints say is compared.
    """
    last = _last(run)
    return last["config_hash"] if last else now


def check_config(config: Config) -> None:
    """Raise PrflError where a run's config is no longer that of its checkpoints, key by key of those that both have."""
    last = _last(config.run)
    saved = last["identity"] if last else {}
    ours = json.loads(json.dumps(identity(config)))  # tuples as lists, as they were written
    changed = [f"{key}: {saved[key]!r} -> {value!r}" for key, value in ours.items() if saved.get(key, value) != value]
    if changed:
        raise PrflError(
            "the config is not the one that the policy was trained with: " + "; ".join(changed),
            where=str(config.run / "config.yaml"),
            fix="put these keys back",
        )


def check_last(path: Path, stamp: Stamp, run: Path) -> None:
    """Raise PrflError for a result that is not of the last training in its run folder."""
    last = _last(run)
    if "run" not in stamp or last is None:
        return
    if stamp["run"] != last["config_hash"]:
        what = f"it is of another run ({stamp['run'][:8]}) than the checkpoints beside it ({last['config_hash'][:8]})"
    elif stamp["end"] != last["step"]:
        what = f"it was written after step {stamp['end']}, and the run has gone on to step {last['step']}"
    else:
        return
    raise PrflError(what, where=str(path), fix="let `prfl train` finish this run first: it writes this anew")
