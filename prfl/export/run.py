"""``prfl export``: from a finished run's folder to a folder that others can load, and to the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from prfl.backbone import adapters
from prfl.backbone.families import FAMILIES
from prfl.backbone.network import predictors
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.export import card
from prfl.export.hub import push as push_files
from prfl.export.lora import write_lora_files
from prfl.factory import provenance
from prfl.factory.backbone import POLICY, build_backbone
from prfl.factory.policy import load_policy, network_folders, read_policy, trained_weights
from prfl.factory.provenance import Stamp, check_config
from prfl.reward.checkpoint import CONFIG, WEIGHTS, find_reward, read_config
from prfl.reward.model_card import reward_card
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_folder, atomic_write, restore_folders
from prfl.utils.lock import NAME as LOCK
from prfl.utils.lock import folder_lock
from prfl.utils.text import visible


def export_run(
    run: Path,
    *,
    out: Path | None = None,
    name: str | None = None,
    dtype: str = "float32",
    merged: bool = False,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Write what the run trained, with a model card, to ``out`` (``run/export``); returns the folder.

    A LoRA run gives NAME.safetensors, for diffusers and ComfyUI (``lora.py``), of a model of several networks a file of
    each, and with ``merged`` the whole transformer as a diffusers folder; full fine-tuning gives that folder; a reward
    run gives the reward.
    name: of the file and in the card; the run folder's own.  push: ``owner/name`` on the hub, uploaded at the end.
    Only the files that it wrote are uploaded; what else is in the folder is named and stays.
    Raises PrflError where there is no finished run, the policy is not that of the config, or the hub refuses.
    """
    config = run_config(run)
    out, name = out or run / "export", name or run.resolve().name
    absolute = out.is_absolute() or ".." in out.parts
    repo = push or (out.name if absolute else str(out))  # the card tells no folder of this machine

    with folder_lock(run if out.resolve().is_relative_to(run.resolve()) else out):
        restore_folders(out)
        if config.trains_reward:
            if merged:
                raise PrflError("a reward has nothing to merge", where=f"{run}", fix="leave --merged out")
            readme, written = _copy_reward(run, out, repo)
        else:
            stamp = _checked(config)
            written = _write_policy(config, out, name, dtype, merged, stamp)
            readme = str(card.policy_card(config, run, name, [path.name for path in written], repo, stamp))
        with atomic_write(out / "README.md") as temporary:
            temporary.write_text(readme, encoding="utf-8")
        written.append(out / "README.md")
        if others := sorted(path.name for path in out.iterdir() if path not in written and path.name != LOCK):
            print(visible(f"also in {out}, not of this export: {', '.join(others)}"))
    if push:
        print(push_files(out, written, push, private=private))
    return out


def run_config(run: Path) -> Config:
    """Load the resolved config of a run folder, which may have been moved.  Raises PrflError for other folders."""
    path = run / "config.yaml"
    if not path.is_file():
        raise PrflError("there is no config.yaml in it", where=str(run), fix="give the folder of a run")
    return load_config(path).model_copy(update={"run": run})


def _checked(config: Config) -> Stamp:
    """Return what made the run's policy; empty where an older prfl wrote it.

    Raises PrflError where the config in the folder is not the one that it was trained with: the card tells of it.
    """
    path = trained_weights(config)
    stamp = provenance.check_stamp(path, config, None)
    check_config(config)
    return stamp or {}


def _write_policy(config: Config, out: Path, name: str, dtype: str, merged: bool, stamp: Stamp) -> list[Path]:
    """Write the LoRA file, the whole networks, or both; returns what was written."""
    trained = trained_weights(config)
    if config.backbone.train == "full":
        folders = network_folders(trained)
        for network, source in folders.items():
            _copy_network(source, out / network, stamp)
        return [out / network for network in folders]

    adapter = config.backbone.adapter
    assert adapter is not None, "the config's rules ask for an adapter"
    networks, form = provenance.networks(stamp), FAMILIES[provenance.family(stamp)].lora
    if len(networks) > 1 and not form.of_networks:
        if merged:
            return write_merged(config, out, stamp)
        what = f"a LoRA on {' and '.join(networks)} cannot be written as one file for others"
        raise PrflError(what, where=str(trained), fix="export merged weights (--merged)")
    how = {"rank": adapter.rank, "alpha": adapter.alpha, "dtype": getattr(torch, dtype), "made_by": stamp}
    files = write_lora_files(out, name, form, read_policy(trained), networks, **how)
    return [*files, *write_merged(config, out, stamp)] if merged else files


def _copy_network(source: Path, folder: Path, stamp: Stamp) -> None:
    """Copy a network's folder, and have its prfl.json say what made it."""
    files = [file for file in sorted(source.iterdir()) if file.name != provenance.BESIDE]
    with atomic_folder(folder) as temporary:
        for file in files:
            if file.suffix == ".safetensors":
                read_policy(file)
            shutil.copyfile(file, temporary / file.name)
        provenance.without_place(temporary / "config.json")
        provenance.write_beside(temporary, stamp, [temporary / file.name for file in files])


def write_merged(config: Config, out: Path, made_by: Stamp | None = None) -> list[Path]:
    """Write the base's weights plus the update, in the type that the run loaded them in, as diffusers folders."""
    model = build_backbone(config)
    load_policy(config, model)
    networks = {name: network for name, network in predictors(model).items() if adapters.has_adapter(network, POLICY)}
    for name, network in networks.items():
        adapters.set_active(network, POLICY)
        network.fuse_lora(adapter_names=[POLICY], safe_fusing=True)
        network.unload_lora()
        with atomic_folder(out / name) as temporary:
            network.save_pretrained(temporary)
            provenance.without_place(temporary / "config.json")
            provenance.write_beside(temporary, made_by or {}, sorted(temporary.iterdir()))
    return [out / name for name in networks]


def _copy_reward(run: Path, out: Path, repo: str) -> tuple[str, list[Path]]:
    """Copy the reward's files; returns the text of its card, and the copies.

    Raises PrflError for weights that are not whole.
    """
    source = run / "reward"
    saved = read_config(source)
    tensors = find_reward(source).all_weights()
    names = [WEIGHTS, CONFIG]
    if stamp := provenance.read_stamp(source):
        provenance.check_last(source, stamp, run)
        names.append(provenance.BESIDE)
    for name in names:
        with atomic_write(out / name) as temporary:
            shutil.copyfile(source / name, temporary)
    measured = card.measured_text(run / "reward_eval.json", provenance.tensors_hash(tensors))
    return f"{reward_card(saved, repo)}\n{measured}\n", [out / name for name in names]
