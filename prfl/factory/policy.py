"""The weights of a trained policy: written, found again, put into a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.backbone.adapters import load_state
from prfl.backbone.family import FIRST_NETWORKS
from prfl.backbone.network import computing, fingerprints
from prfl.backbone.weights import check_finite
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.factory import provenance
from prfl.factory.backbone import POLICY, build_backbone, policy_adapter_name
from prfl.factory.provenance import Moment
from prfl.training.checkpoint import check_whole, list_checkpoints
from prfl.utils.errors import PrflError, error_location
from prfl.utils.files import atomic_folder, atomic_write, read_tensors
from prfl.utils.hashing import remembered_hash

AGAIN = "run `prfl train` on this config again"
DIVERGED = "train again with a lower training.learning_rate"


def save_policy(folder: Path, model: Backbone, config: Config, moment: Moment | None = None) -> None:
    """The adapter's weights as they are now; after full fine-tuning each network, as a folder for diffusers.

    All carry what made them (``provenance``); moment: of the run, None where no run trained them.
    """
    stamp = provenance.stamp_of(config, model, moment)
    if config.backbone.train == "full":
        for name, network in computing(model, policy_adapter_name(config)).items():
            with atomic_folder(folder / name) as written:
                network.save_pretrained(written)
                provenance.without_place(written / "config.json")
                provenance.write_beside(written, stamp, sorted(written.iterdir()))
        return
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.parameters(POLICY).items()}
    with atomic_write(folder / "policy.safetensors") as temporary:
        stamped = {**stamp, "weights": provenance.tensors_hash(tensors)}
        save_file(tensors, temporary, metadata=provenance.metadata(stamped))


def policy_path(config: Config, folder: Path) -> Path:
    """The file (an adapter) or the first network's folder (all weights) that ``save_policy`` writes."""
    if config.backbone.train == "lora":
        return folder / "policy.safetensors"
    first, *others = [folder / name for name in FIRST_NETWORKS]
    return next((path for path in others if path.exists()), first)


def trained_weights(config: Config) -> Path:
    """Find the policy of the config's run.  Raises PrflError if there is none, or if an earlier training wrote it."""
    path = policy_path(config, config.run)
    if not path.exists():
        raise PrflError("there is no trained policy", where=str(path), fix="let `prfl train` finish this run first")
    stamp = provenance.read_stamp(path)
    if stamp is not None:
        provenance.check_last(path, stamp, config.run)
    return path


def network_folders(path: Path) -> dict[str, Path]:
    """The folder of each network of a policy of all weights, the first of which is at ``path``.

    Raises PrflError where one of the others is missing, or of another moment: a crash came between their writing.
    """
    stamp = provenance.read_stamp(path)
    first, *others = provenance.networks(stamp)
    folders = {first: path} | {name: path.with_name(name) for name in others}
    for name in others:
        beside = provenance.read_stamp(folders[name]) if folders[name].is_dir() else None
        if any((beside or {}).get(key) != (stamp or {}).get(key) for key in ("run", "step", "end")):
            what = f"the {name} of the policy is missing, or not of the moment of its {first}"
            raise PrflError(what, where=str(folders[name]), fix=AGAIN)
    return folders


def moment_of(config: Config) -> dict[str, Any]:
    """Step, end and run of the policy of the config's run; empty where they are not known."""
    stamp = provenance.read_stamp(trained_weights(config)) or {}
    return {key: stamp[key] for key in ("step", "end", "run") if key in stamp}


def load_policy(config: Config, model: Backbone, path: Path | None = None) -> None:
    """Put trained weights into the adapter, or all of them into the model.  path: None is ``trained_weights``.

    Raises PrflError for weights of another model or adapter, damaged ones, and those that are not finite.
    """
    path = trained_weights(config) if path is None else path
    if config.backbone.train == "lora":
        provenance.check_stamp(path, config, model)
        load_state(model.parameters(POLICY), POLICY, read_policy(path))
        return
    folders = network_folders(path)
    for name, network in computing(model, policy_adapter_name(config)).items():
        if name not in folders:
            raise PrflError(f"the policy has no {name}, which the model has", where=str(path), fix=AGAIN)
        provenance.check_stamp(folders[name], config, model)
        _load_network(folders[name], network)


def _load_network(path: Path, network: nn.Module) -> None:
    """Copy the safetensors of a folder into a network.  Raises PrflError where they are not just its weights."""
    weights = network.state_dict()
    missing = set(weights)
    for file in sorted(path.glob("*.safetensors")):  # one at a time: a second copy of all weights is tens of GiB
        tensors = read_policy(file)
        _check_names(file, {name: weights[name].shape for name in weights}, {n: t.shape for n, t in tensors.items()})
        for name, tensor in tensors.items():
            with torch.no_grad():
                weights[name].copy_(tensor)
        missing -= tensors.keys()
    if missing:
        what = f"{len(missing)} of its weights are missing, the first is {min(missing)}"
        raise PrflError(what, where=str(path), fix=AGAIN)


def load_checkpoint_policy(config: Config, model: Backbone, name: str) -> str:
    """Put the weights of a checkpoint of the run, as ``step-000050``, into the adapter: their average where it has one.

    Returns a hash of them.  Raises PrflError where there is no such checkpoint, it is damaged, or of another adapter.
    """
    if config.backbone.train == "full":
        fix = "leave it out; the last step's weights are in the run's folder"
        raise PrflError("a checkpoint of all weights cannot be sampled", where="--checkpoint", fix=fix)
    checkpoints = list_checkpoints(config.run / "checkpoints")
    chosen = next((path for path in checkpoints if path.name == name), None)
    if chosen is None:
        there = ", ".join(path.name for path in checkpoints) or "none"
        raise PrflError(f"there is no checkpoint {name}", where=str(config.run), fix=f"those that there are: {there}")
    facts = check_whole(chosen)
    file = chosen / ("ema.safetensors" if "ema.safetensors" in facts["files"] else "weights.safetensors")
    with error_location(str(file)):
        load_state(model.parameters(POLICY), POLICY, read_tensors(file, AGAIN))
    return remembered_hash(file)


def scale_adapter(config: Config, model: Backbone, scale: float) -> None:
    """Multiply what the policy's adapter changes by ``scale``.  Raises PrflError where all weights were trained."""
    if config.backbone.train == "full":
        raise PrflError("all weights were trained: there is no adapter", where="--lora-scale", fix="leave it out")
    with torch.no_grad():
        for name, parameter in model.parameters(POLICY).items():
            if ".lora_B." in name:
                parameter.mul_(scale)


def read_policy(file: Path) -> dict[str, Tensor]:
    """Its tensors.  Raises PrflError for a damaged file, and for values that are not finite."""
    tensors = read_tensors(file, AGAIN)
    check_finite(tensors, str(file), DIVERGED)
    provenance.check_weights(file, provenance.read_stamp(file), tensors)
    return tensors


def _check_names(file: Path, expected: dict[str, torch.Size], saved: dict[str, torch.Size]) -> None:
    wrong = sorted(name for name, shape in saved.items() if expected.get(name) != shape)
    if wrong:
        what = f"{len(wrong)} of its weights do not fit the model, the first is {wrong[0]}"
        raise PrflError(what, where=str(file), fix=AGAIN)


def finished_run_config(run: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a run's folder, wherever that was moved to.  overrides: of its keys.  Raises PrflError."""
    path = run / "config.yaml"
    if not path.is_file():
        raise PrflError("there is no config.yaml in it", where=str(run), fix="give the folder of a run")
    return load_config(path, overrides).model_copy(update={"run": run})


def policy_model(config: Config, run: Path, model: Backbone) -> tuple[Backbone, str | None]:
    """A backbone of its own with a run's trained policy, and the adapter to draw with; ``model`` stays as it is.

    Raises PrflError for a policy of another model than ``model``, the config's own.
    """
    trained = finished_run_config(run)
    where = {"device": config.backbone.device, "compile": False}
    trained = trained.model_copy(update={"backbone": trained.backbone.model_copy(update=where)})
    trained_weights(trained)
    drawing = build_backbone(trained)
    if fingerprints(drawing) != fingerprints(model):
        raise PrflError(
            f"the policy of {run} was trained from another model ({trained.backbone.model})",
            where="data.generator.policies",
            fix=f"name a run with backbone.model: {config.backbone.model}",
        )
    load_policy(trained, drawing)
    return drawing, policy_adapter_name(trained)


def weights_hash(config: Config) -> str:
    """Tells one trained policy from another: a hash of its files."""
    path = trained_weights(config)
    folders = [] if path.is_file() else network_folders(path).values()
    files = [path] if path.is_file() else [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return " ".join(map(remembered_hash, files))
