"""``prfl export``: from a finished run's folder to a folder that others can load, and to the hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from prfl import build
from prfl.backbone import adapters
from prfl.config import load_config
from prfl.config.schema import Config, PreferenceConfig
from prfl.data.files import read_tensors, replacing, replacing_folder, restore_folders
from prfl.data.lock import folder_lock
from prfl.errors import PrflError
from prfl.export import card
from prfl.export.hub import push as push_folder
from prfl.export.lora import write_shared_file
from prfl.reward.card import reward_card
from prfl.reward.files import CONFIG, WEIGHTS, read_config


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

    A LoRA run gives NAME.safetensors, for diffusers and ComfyUI (``lora.py``), and with ``merged`` the whole
    transformer as a diffusers folder; full fine-tuning gives that folder; a reward run gives the reward.
    name: of the file and in the card; the run folder's own.  push: ``owner/name`` on the hub, uploaded at the end.
    Raises PrflError where there is no finished run, or the hub refuses.
    """
    config = run_config(run)
    out, name = out or run / "export", name or run.resolve().name
    repo = push or str(out)
    with folder_lock(run if out.resolve().is_relative_to(run.resolve()) else out):
        restore_folders(out)
        if isinstance(config.objective, PreferenceConfig):
            if merged:
                raise PrflError("a reward has nothing to merge", where=f"{run}", fix="leave --merged out")
            readme = _copy_reward(run, out, repo)
        else:
            contents = _write_policy(config, out, name, dtype, merged)
            readme = str(card.policy_card(config, run, name, contents, repo))
        with replacing(out / "README.md") as temporary:
            temporary.write_text(readme, encoding="utf-8")
    if push:
        print(push_folder(out, push, private=private))
    return out


def run_config(run: Path) -> Config:
    """The resolved config of a run folder, which may have been moved since.  Raises PrflError for another folder."""
    path = run / "config.yaml"
    if not path.is_file():
        raise PrflError("there is no config.yaml in it", where=str(run), fix="give the folder of a run")
    return load_config(path).model_copy(update={"run": run})


def _write_policy(config: Config, out: Path, name: str, dtype: str, merged: bool) -> list[str]:
    """Which of ``lora`` and ``transformer`` it wrote."""
    if config.backbone.train == "full":
        trained = build.trained_weights(config)
        with replacing_folder(out / "transformer") as temporary:
            shutil.copytree(trained, temporary, dirs_exist_ok=True)
        return ["transformer"]
    own = config.backbone.adapter
    assert own is not None, "the config's rules ask for an adapter"
    again = "run `prfl train` on its config again; it ends by writing this file"
    state = read_tensors(build.trained_weights(config), again)
    file = out / f"{name}.safetensors"
    write_shared_file(file, state, rank=own.rank, alpha=own.alpha, dtype=getattr(torch, dtype))
    if not merged:
        return ["lora"]
    write_merged(config, out / "transformer")
    return ["lora", "transformer"]


def write_merged(config: Config, folder: Path) -> None:
    """The base's weights plus the update, in the type that the run loaded them in, as a diffusers folder."""
    model = build.backbone(config)
    build.load_policy(config, model)
    adapters.set_active(model.transformer, build.POLICY)
    model.transformer.fuse_lora(adapter_names=[build.POLICY], safe_fusing=True)
    model.transformer.unload_lora()
    with replacing_folder(folder) as temporary:
        model.transformer.save_pretrained(temporary)


def _copy_reward(run: Path, out: Path, repo: str) -> str:
    """The reward's two files; returns the text of its card."""
    source = run / "reward"
    saved = read_config(source)
    for file in (WEIGHTS, CONFIG):
        with replacing(out / file) as temporary:
            shutil.copyfile(source / file, temporary)
    return f"{reward_card(saved, repo)}\n{card.measured_text(run / 'reward_eval.json')}\n"
