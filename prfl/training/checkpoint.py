"""Atomic checkpoints: safetensors and json only, written to a hidden folder and moved into place.

    checkpoints/step-000100/{weights,optimizer,ema}.safetensors, state.json

``weights`` and ``ema`` hold the trained parameters by the names that the objective gives them.  There is no state of a
random generator and no position in the data: both are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prfl.errors import PrflError
from prfl.training.ema import Ema, copy_into
from prfl.training.guards import plain

FORMAT = 1


@dataclass
class TrainState:
    """All that changes while a run trains.  ``step`` counts finished steps."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write folder/step-N so that it is there whole or not at all; then remove all but the newest ``keep``."""
    final = folder / f"step-{state.step:06d}"
    temporary, old = folder / f".tmp-{final.name}", folder / f".old-{final.name}"
    for left_over in folder.glob(".*-step-*"):  # of a run that was killed while it saved
        shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    for name, tensors in checkpoint_tensors(state).items():
        save_file(plain(tensors), temporary / f"{name}.safetensors")
    files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    facts = {"format": FORMAT, "step": state.step, "files": files, "identity": state.identity}
    facts["ema_updates"] = state.ema.updates if state.ema else None
    (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n")
    flush(temporary)
    if final.exists():  # a run resumed from an older checkpoint comes by again
        os.replace(final, old)
    os.replace(temporary, final)
    shutil.rmtree(old, ignore_errors=True)
    for stale in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(stale)
    return final


def checkpoint_tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {"weights": dict(state.parameters), "optimizer": {}}
    names = list(state.parameters)
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors["optimizer"] |= {f"{names[index]}/{name}": value for name, value in moments.items()}
    if state.ema:
        tensors["ema"] = dict(state.ema.average)
    return tensors


def flush(folder: Path) -> None:
    """Force the files to the disk before the folder gets its final name."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that ``auto | none | PATH`` means; PATH is a checkpoint or a run folder."""
    found = list_checkpoints(folder)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "none":
        if found:
            raise PrflError(
                "the run folder already has checkpoints, and the run is told to start anew",
                where=str(folder),
                fix="use another run folder, delete this one, or resume with `auto`",
            )
        return None
    path = Path(resume)
    inside = list_checkpoints(path / "checkpoints")
    if inside:
        return inside[-1]
    if not (path / "state.json").is_file():
        raise PrflError("there is no checkpoint to resume from", where=resume, fix="give a step-N or a run folder")
    return path


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Restore everything in ``state``, or raise PrflError: truncated file, other parameters, another config."""
    facts = read_facts(path)
    check_identity(path, facts["identity"], state.identity)
    weights = read_tensors(path / "weights.safetensors")
    check_names(path, weights, state.parameters)
    copy_into(state.parameters, weights)
    load_optimizer(read_tensors(path / "optimizer.safetensors"), state)
    if state.ema:
        state.ema.load(read_tensors(path / "ema.safetensors"), facts["ema_updates"])
    state.step = facts["step"]


def load_optimizer(tensors: dict[str, Tensor], state: TrainState) -> None:
    position = {name: index for index, name in enumerate(state.parameters)}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, moment = name.rsplit("/", 1)
        moments.setdefault(position[parameter], {})[moment] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def read_facts(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, after comparing the sizes of its files with what was written."""
    facts = json.loads((path / "state.json").read_text())
    for name, size in facts["files"].items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            raise PrflError(
                f"the checkpoint is damaged: {name} has {there} bytes, {size} were written",
                where=str(path),
                fix="delete it, and the run resumes from the one before",
            )
    return facts


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        what = f"not a readable safetensors file: {error}"
        raise PrflError(what, where=str(path), fix="delete the checkpoint") from None


def check_names(path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name in sorted(weights.keys() | parameters.keys()):
        saved, here = (tuple(d[name].shape) if name in d else None for d in (weights, parameters))
        if saved != here:
            raise PrflError(
                f"the checkpoint fits another set of parameters: {name} is {saved} there, {here} here",
                where=str(path),
                fix="use the adapter rank, targets and backbone of the run that wrote it",
            )


def check_identity(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Everything that decides the numbers of a run must be as it was; what may change is not in ``identity``."""
    now = json.loads(json.dumps(now))  # tuples as lists, as they were written
    changed = [
        f"{key}: {saved.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if changed:
        raise PrflError(
            "the config is not the one of the checkpoint: " + "; ".join(changed),
            where=str(path),
            fix="put these keys back, or train in another run folder",
        )
