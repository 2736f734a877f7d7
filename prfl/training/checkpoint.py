"""Atomic checkpoints: safetensors and json only, written to a hidden folder and moved into place.

    checkpoints/step-000100/{weights,optimizer,ema,objective}.safetensors, state.json

``weights`` and ``ema`` hold the trained parameters by the names that the objective gives them, ``objective`` is there
where the objective carries something of its own from step to step; ``state.json`` has the step, the sizes of the files
and the ``identity``: all that decides the numbers of a run (the config, and fingerprints of the model, the reward, the
clips and the prompts).  The learning rate, the position in the data and the state of every random generator are
functions of (identity, step), so there is nothing of them to save.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl.backbone.weights import copy_into
from prfl.data.files import read_tensors, replacing_folder, restore_folders
from prfl.errors import PrflError
from prfl.objective import Stateful
from prfl.training.ema import Ema
from prfl.training.guards import plain

FORMAT = 1


@dataclass
class TrainState:
    """All that changes while a run trains.  ``step`` counts finished steps, ``steps`` is where the run is to end."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    objective: Stateful | None = None


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write folder/step-N so that it is there whole or not at all; then remove all but the newest ``keep``.

    Raises PrflError when the disk is full; the checkpoints before are whole.
    """
    final = folder / f"step-{state.step:06d}"
    with replacing_folder(final) as temporary:
        for name, tensors in checkpoint_tensors(state).items():
            save_file(plain(tensors), temporary / f"{name}.safetensors")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        facts = {"format": FORMAT, "step": state.step, "steps": state.steps, "files": files}
        facts |= {"config_hash": identity_hash(state.identity), "identity": state.identity}
        facts["ema_updates"] = state.ema.updates if state.ema else None
        (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
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
    if state.objective and (carried := state.objective.carried()):
        tensors["objective"] = carried
    return tensors


def identity_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that have their final name, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def tidy(folder: Path, resume: str) -> list[Path]:
    """Bring the folder of a run that may have been killed, or whose disk failed, into order; call it on one process.

    Half-written checkpoints go.  With ``auto``, damaged ones that are newer than the newest whole one are renamed to
    ``damaged-step-N`` and returned: the whole one is then found.  Where none is whole nothing is renamed.
    """
    restore_folders(folder)
    damaged: list[Path] = []
    if resume != "auto":
        return damaged
    for path in reversed(list_checkpoints(folder)):
        try:
            read_facts(path)
        except PrflError:
            damaged.append(path)
            continue
        break
    else:
        return []
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    return damaged


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint that ``auto | none | PATH`` means; PATH is a checkpoint or a run folder.

    Raises PrflError where PATH has none, where it is followed by newer ones of this very run (going on from it would
    leave two histories in one folder), and where ``none`` meets a run that has some.
    """
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
    if found and path.resolve().parent == folder.resolve() and path.name != found[-1].name:
        raise PrflError(
            f"the run has gone on from there: {found[-1].name} is newer",
            where=resume,
            fix="give the resumed run a folder of its own (run=FOLDER), or move the newer checkpoints away first",
        )
    return path


def load_checkpoint(path: Path, state: TrainState) -> int:
    """Restore everything in ``state``, or raise PrflError and change nothing: a damaged file, other parameters,
    another config.  Returns where the run was to end when it was saved."""
    facts = read_facts(path)
    check_identity(path, facts["identity"], state.identity)
    fix = damaged_fix(path)
    weights, moments = (read_tensors(path / f"{name}.safetensors", fix) for name in ("weights", "optimizer"))
    average = read_tensors(path / "ema.safetensors", fix) if state.ema else {}
    carried = "objective.safetensors"
    carries = read_tensors(path / carried, fix) if carried in facts["files"] else {}
    check_names(path, weights, state.parameters)
    check_moments(path, moments, state.parameters)
    if state.objective and carries:
        state.objective.restore(carries)
    if state.ema:
        check_names(path, average, state.parameters)
        state.ema.load(average, facts["ema_updates"])
    copy_into(state.parameters, weights)
    load_optimizer(moments, state)
    state.step = facts["step"]
    return facts["steps"]


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
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files, version = dict(facts["files"]), facts["format"]
        _ = facts["step"], facts["steps"], facts["identity"], facts["ema_updates"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"the checkpoint is damaged: state.json cannot be read ({type(error).__name__}: {error})"
        raise PrflError(what, where=str(path), fix=damaged_fix(path)) from error
    if version != FORMAT:
        fix = "resume it with the version of prfl that wrote it, or start anew in another run folder"
        raise PrflError(f"a checkpoint of format {version}, this prfl reads {FORMAT}", where=str(path), fix=fix)
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            what = f"the checkpoint is damaged: {name} has {there or 0} bytes, {size} were written"
            raise PrflError(what, where=str(path), fix=damaged_fix(path))
    return facts


def damaged_fix(path: Path) -> str:
    """What to do about a damaged checkpoint: it names the one before, if there is one."""
    older = [other for other in list_checkpoints(path.parent) if other.name < path.name]
    before = f"--resume {older[-1]}" if older else "there is none before it, so the run starts anew"
    return f"delete the damaged checkpoint and resume from the one before: {before}"


def check_names(path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name in sorted(weights.keys() | parameters.keys()):
        saved, here = (tuple(d[name].shape) if name in d else None for d in (weights, parameters))
        if saved != here:
            raise PrflError(
                f"the checkpoint fits another set of parameters: {name} is {saved} there, {here} here",
                where=str(path),
                fix="use the adapter rank, targets and backbone of the run that wrote it",
            )


def check_moments(path: Path, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """The optimizer's tensors, ``PARAMETER/step`` (a number) and averages of the parameter's own shape."""
    for name, value in moments.items():
        parameter, _, moment = name.rpartition("/")
        fits = parameter in parameters and (moment == "step" or value.shape == parameters[parameter].shape)
        if not fits:
            what = f"the optimizer's state does not fit the parameters: {name} is {tuple(value.shape)}"
            raise PrflError(what, where=str(path), fix=damaged_fix(path))


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
