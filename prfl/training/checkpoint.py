"""Atomic checkpoints: safetensors and json only, written to a hidden folder and moved into place.

    checkpoints/step-000100/{weights,optimizer,ema,objective}.safetensors, state.json

``weights`` and ``ema`` hold the trained parameters by the names that the objective gives them, ``objective`` is there
where the objective carries something of its own from step to step; ``state.json`` has the step, sizes and hashes of the
files and the ``identity``: all that decides the numbers of a run (the config, and fingerprints of the model, the
reward, the clips and the prompts; no places, so that these may be moved).  The learning rate, the position in the data
and the state of every random generator are functions of (identity, step), so there is nothing of them to save.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl.backbone.weights import check_finite, copy_into
from prfl.config.load import is_default
from prfl.objective import Stateful
from prfl.training.ema import Ema
from prfl.utils.console import warn
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_folder, read_tensors, remove_folder, restore_folders
from prfl.utils.hashing import content_hash, json_hash
from prfl.utils.reading import unreadable

FORMAT = 1
VERSION = "version of this identity"  # a key of the identity; older checkpoints have none
PLACES = {  # keys of older checkpoints' identity: what lies there is compared in their stead
    "backbone.model", "data.cache", "data.manifest", "data.prompts.train", "data.prompts.validation",
    "data.prompts.test", "data.generator.videos", "data.generator.policies", "reward.path", "reward.aesthetic.mlp",
    "reward.aesthetic.clip",
}  # fmt: skip


@dataclass
class TrainState:
    """All that changes while a run trains.  ``step`` counts finished steps, ``steps`` is where the run is to end.

    former: of the identity, what older checkpoints hold under another name.
    changing: a step has begun to change it, and is not finished: it is that of no step.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    objective: Stateful | None = None
    former: Mapping[str, Any] = field(default_factory=dict)
    changing: bool = False


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write folder/step-N so that it is there whole or not at all; then remove all but the newest ``keep``.

    Raises PrflError when the disk is full; the checkpoints before are whole.
    """
    final = folder / step_name(state.step)
    with atomic_folder(final) as temporary:
        for name, tensors in checkpoint_tensors(state).items():
            save_file(detached_copies(tensors), temporary / f"{name}.safetensors")
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        facts: dict[str, Any] = {"format": FORMAT, "step": state.step, "steps": state.steps, "files": files}
        facts["sha256"] = file_hashes(temporary, files)
        facts |= {"config_hash": identity_hash(state.identity), "identity": state.identity}
        facts["ema_updates"] = state.ema.updates if state.ema else None
        facts["checksum"] = identity_hash(facts)
        (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for stale in list_checkpoints(folder)[:-keep]:
        if reason := remove_folder(stale):
            warn(f"{stale}, which is no longer needed, cannot be removed: {reason}")
    return final


def checkpoint_tensors(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint's files, by the files' names and their own."""
    tensors: dict[str, dict[str, Tensor]] = {"weights": dict(state.parameters), "optimizer": {}}
    names = list(state.parameters)
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors["optimizer"] |= {f"{names[index]}/{name}": value for name, value in moments.items()}
    if state.ema:
        tensors["ema"] = dict(state.ema.average)
    if state.objective and (of_objective := state.objective.state_dict()):
        tensors["objective"] = of_objective
    return tensors


def detached_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached, contiguous CPU copies, as safetensors wants them: no two of them in one storage."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash files of a folder, several at once: hashing is slower than the disks that large checkpoints go to."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(content_hash, [folder / name for name in names]), strict=True))


def identity_hash(identity: Mapping[str, Any]) -> str:
    return json_hash(identity)[:16]


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that have their final name, oldest first."""
    checkpoints = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(checkpoints, key=lambda path: int(path.name.removeprefix("step-")))


def tidy(folder: Path, resume: str) -> list[Path]:
    """Bring the folder of a run that may have been killed, or whose disk failed, into order; call it on one process.

    Half-written checkpoints go.  With ``auto``, damaged ones that are newer than the newest whole one are renamed to
    ``damaged-step-N`` and returned: the whole one is then found.  Where none is whole nothing is renamed.
    """
    restore_folders(folder)
    damaged: list[Path] = []
    if resume != "auto":
        return damaged

    # Which are damaged, down to the newest whole one.
    for path in reversed(list_checkpoints(folder)):
        try:
            check_whole(path)
        except PrflError:
            damaged.append(path)
            continue
        break
    else:
        return []

    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists() or aside.is_symlink():
            remove_folder(aside)
        path.rename(aside)
    return damaged


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Return the checkpoint that ``auto | none | PATH`` means; PATH is a checkpoint or a run folder.

    Raises PrflError where PATH has none, and where it is followed by newer ones of this very run (going on from it
    would leave two histories in one folder).
    """
    checkpoints = list_checkpoints(folder)
    if resume == "auto":
        return checkpoints[-1] if checkpoints else None
    if resume == "none":
        return None

    path = Path(resume)
    of_run = list_checkpoints(path / "checkpoints")
    if of_run:
        return of_run[-1]
    if not (path / "state.json").is_file():
        raise PrflError("there is no checkpoint to resume from", where=resume, fix="give a step-N or a run folder")
    if checkpoints and path.resolve().parent == folder.resolve() and path.name != checkpoints[-1].name:
        raise PrflError(
            f"the run has gone on from there: {checkpoints[-1].name} is newer",
            where=resume,
            fix="give the resumed run a folder of its own (run=FOLDER), or move the newer checkpoints away first",
        )
    return path


def load_checkpoint(path: Path, state: TrainState) -> int:
    """Restore everything in ``state`` from a checkpoint; returns where the run was to end when it was saved.

    Raises PrflError, and changes nothing, for a damaged file, other parameters or another config.
    """
    facts = check_whole(path)
    check_identity(path, facts["identity"], state.identity, state.former)

    # Read everything before anything is changed.
    fix = damaged_fix(path)
    weights = read_tensors(path / "weights.safetensors", fix)
    moments = read_tensors(path / "optimizer.safetensors", fix)
    average = read_tensors(path / "ema.safetensors", fix) if state.ema else {}
    objective_file = "objective.safetensors"
    of_objective = read_tensors(path / objective_file, fix) if objective_file in facts["files"] else {}
    check_names(path, weights, state.parameters)
    check_moments(path, moments, state.parameters)

    if state.objective and of_objective:
        state.objective.load_state_dict(of_objective)
    if state.ema:
        check_names(path, average, state.parameters)
        state.ema.load(average, facts["ema_updates"])
    copy_into(state.parameters, weights)
    load_optimizer(moments, state)
    state.step = facts["step"]
    return facts["steps"]


def load_optimizer(tensors: dict[str, Tensor], state: TrainState) -> None:
    """Give the optimizer its moments.  tensors: by PARAMETER/MOMENT, as ``checkpoint_tensors`` names them."""
    position = {name: index for index, name in enumerate(state.parameters)}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, moment = name.rsplit("/", 1)
        moments.setdefault(position[parameter], {})[moment] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def read_facts(path: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint, and compare it and the sizes of the files with what was written.

    Raises PrflError where they differ, or where the format is another.
    """
    try:
        facts = json.loads((path / "state.json").read_text(encoding="utf-8"))
        files, version = dict(facts["files"]), facts["format"]
        _ = facts["step"], facts["steps"], facts["identity"], facts["ema_updates"]
    except PermissionError as error:
        raise unreadable(path / "state.json", error) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"the checkpoint is damaged: state.json cannot be read ({type(error).__name__}: {error})"
        raise PrflError(what, where=str(path), fix=damaged_fix(path)) from error
    if version != FORMAT:
        fix = "resume it with the version of prfl that wrote it, or start anew in another run folder"
        raise PrflError(f"a checkpoint of format {version}, this prfl reads {FORMAT}", where=str(path), fix=fix)

    # The name, the checksum and the sizes must be those of when it was written.
    step_in_name = re.fullmatch(r"step-(\d+)", path.name)
    if step_in_name and int(step_in_name[1]) != facts["step"]:
        what = f"the checkpoint is damaged: it is called {path.name} and holds step {facts['step']}"
        raise PrflError(what, where=str(path), fix=damaged_fix(path))
    rest = {name: value for name, value in facts.items() if name != "checksum"}
    if facts.get("checksum", identity_hash(rest)) != identity_hash(rest):
        what = "the checkpoint is damaged: state.json was changed since it was written"
        raise PrflError(what, where=str(path), fix=damaged_fix(path))
    for name, size in files.items():
        present = (path / name).stat().st_size if (path / name).is_file() else None
        if present != size:
            what = f"the checkpoint is damaged: {name} has {present or 0} bytes, {size} were written"
            raise PrflError(what, where=str(path), fix=damaged_fix(path))
    return facts


def check_whole(path: Path) -> dict[str, Any]:
    """Read all of a checkpoint and return its facts, as ``read_facts`` does.

    Raises PrflError for files that are not those that were written; of an older checkpoint, which has no hashes, for
    values that are not finite.
    """
    facts = read_facts(path)
    stats = [(path / name).stat() for name in facts["files"]]
    _check_files(path, tuple(sorted(facts.get("sha256", {}).items())), tuple(facts["files"]), str(stats))
    return facts


@lru_cache(maxsize=8)  # a checkpoint is looked through when the folder is tidied, and loaded soon after
def _check_files(path: Path, hashes: tuple[tuple[str, str], ...], names: tuple[str, ...], stats: str) -> None:
    """Compare the files with their hashes.  stats: sizes and times of the files, which change when they do."""
    if hashes:
        present = file_hashes(path, names)
        for name, digest in hashes:
            if present.get(name) != digest:
                what = f"the checkpoint is damaged: {name} is not as it was written (its hash is another)"
                raise PrflError(what, where=str(path), fix=damaged_fix(path))
        return
    for name in {"weights.safetensors", "optimizer.safetensors", "ema.safetensors"} & set(names):
        check_finite(read_tensors(path / name, damaged_fix(path)), str(path / name), damaged_fix(path))


def damaged_fix(path: Path) -> str:
    """Say what to do about a damaged checkpoint: it names the one before, if there is one."""
    older = [other for other in list_checkpoints(path.parent) if other.name < path.name]
    if not older:
        return "delete the damaged checkpoint: there is none before it, so the run starts anew"
    return f"delete the damaged checkpoint and resume from the one before: --resume {older[-1]}"


def check_names(path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise PrflError unless the saved tensors have the names and the shapes of the parameters."""
    for name in sorted(weights.keys() | parameters.keys()):
        saved, here = (tuple(d[name].shape) if name in d else None for d in (weights, parameters))
        if saved != here:
            raise PrflError(
                f"the checkpoint fits another set of parameters: {name} is {saved} there, {here} here",
                where=str(path),
                fix="use the adapter rank, targets and backbone of the run that wrote it",
            )


def check_moments(path: Path, moments: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise PrflError unless the optimizer's tensors fit: PARAMETER/step is a number, its averages have its shape."""
    for name, value in moments.items():
        parameter, _, moment = name.rpartition("/")
        fits = parameter in parameters and (moment == "step" or value.shape == parameters[parameter].shape)
        if not fits:
            what = f"the optimizer's state does not fit the parameters: {name} is {tuple(value.shape)}"
            raise PrflError(what, where=str(path), fix=damaged_fix(path))


def check_identity(
    path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], former: Mapping[str, Any] | None = None
) -> None:
    """Raise PrflError where anything that decides the numbers of a run is not as it was.

    What may change is not in the identity.  One of an older version is compared in what it has; former: what it has
    under another name.
    """
    now = json.loads(json.dumps(now))  # tuples as lists, as they were written
    if VERSION not in saved:
        saved = {key: value for key, value in saved.items() if key not in PLACES}
        now = {key: value for key, value in now.items() if saved.get(key) or not _came_later(key)} | dict(former or {})
    now = {key: value for key, value in now.items() if key in saved or not _is_new(key, value, saved)}

    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if not changed:
        return
    contents = [key for key in changed if _of_content(key)]
    what = "what the config names has changed since" if contents == changed else "the config is not the one of"
    fixes = ["put these keys back"] if contents != changed else []
    if contents:
        fixes.append(f"bring back what lay at {', '.join(dict.fromkeys(key.partition(' (')[0] for key in contents))}")
    listed = "; ".join(f"{key}: {saved.get(key)!r} -> {now.get(key)!r}" for key in changed)
    fix = f"{' and '.join(fixes)}, or train in another run folder"
    raise PrflError(f"{what} the checkpoint: {listed}", where=str(path), fix=fix)


def _of_content(key: str) -> bool:
    """Return whether a key describes what lies at a place that the config names."""
    return " (" in key


def _came_later(key: str) -> bool:
    """Return whether a key describes what lies at a place: of that, older checkpoints have less."""
    return _of_content(key) or key == VERSION


def _is_new(key: str, value: Any, saved: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint's version did not have this key, and it is left at its default.

    A key of a section that was not given then (``objective.sft: null``) is not new.
    """
    parts = key.split(".")
    sections = {".".join(parts[:count]) for count in range(1, len(parts))}
    return not sections & saved.keys() and is_default(key, value)
