"""What a run needs and this machine does not have yet."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from prfl.config.data_schema import ClipsConfig, SamplesConfig, is_hub_id
from prfl.config.schema import Config, PixelRewardConfig, listed
from prfl.data.manifest import read_manifest
from prfl.factory.reward import reward_path
from prfl.reward.aesthetic import AESTHETIC_MLP

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
CLIP_WEIGHTS = ["model.safetensors", "model.safetensors.index.json"]


def missing_inputs(config: Config, filled: Collection[Path] = ()) -> list[str]:
    """List what is missing, a line each: the yaml path, what is not there, and how to get it.

    Prompt files and manifests are read.

    filled: run folders that earlier stages will have filled by then.
    """
    downloaded = downloads(config).items()
    lines = [f"{key}: {name} is not in the hub's cache here; the run downloads it" for key, name in downloaded]
    lines += [*_rewards(config, filled), _held_out(config, filled), *_policies(config, filled)]
    lines += [_manifest(config), _videos(config)]
    return [line for line in lines if line]


def downloads(config: Config) -> dict[str, str]:
    """Return yaml key -> hub id of what has to be downloaded: it is in no folder and not in the hub's cache here."""
    model = config.backbone
    wanted = {"backbone.model": (model.model, model.revision, [f"transformer/{name}" for name in WEIGHTS])}
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        clip = config.reward.aesthetic
        wanted["reward.aesthetic.clip"] = (clip.clip, clip.revision, CLIP_WEIGHTS)
    absent = {}
    for key, (name, revision, files) in wanted.items():
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in files] if is_hub_id(name) else []
        if is_hub_id(name) and not any(isinstance(path, str) for path in cached):
            absent[key] = name
    return absent


def _rewards(config: Config, filled: Collection[Path]) -> list[str]:
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        mlp = config.reward.aesthetic.mlp
        return [] if mlp.is_file() else [f"reward.aesthetic.mlp: there is no file {mlp}; {AESTHETIC_MLP}"]
    paths = listed(config.reward.path) if config.reward else []
    return [_saved("reward.path", path, filled) for path in paths]


def _held_out(config: Config, filled: Collection[Path]) -> str:
    return _saved("evaluation.held_out_reward", config.evaluation.held_out_reward, filled)


def _saved(key: str, path: str | None, filled: Collection[Path]) -> str:
    """Say that a saved reward is missing; empty where it is here, will be, or is an id of the hub."""
    if path is None or Path(reward_path(path)).is_dir() or any(Path(path).is_relative_to(run) for run in filled):
        return ""
    if is_hub_id(path) and not path.startswith("runs/") and not Path(path).parent.is_dir():
        return ""
    return f"{key}: there is no folder {path}; train it first, or name a saved reward (a folder or a hub id)"


def _policies(config: Config, filled: Collection[Path]) -> list[str]:
    generator = config.data.generator
    runs = [run for run in generator.policies if run is not None] if isinstance(generator, SamplesConfig) else []
    absent = [run for run in runs if run not in filled and not (run / "config.yaml").is_file()]
    return [f"data.generator.policies: there is no finished run in {run}; train it first" for run in absent]


def _manifest(config: Config) -> str:
    path = config.data.manifest
    if path is None:
        return ""
    if path.is_file():
        read_manifest(path, follow_links=config.data.follow_links)
        return ""
    return f"data.manifest: there is no file {path}; write one (JSON lines: see README.md, Use), or name another"


def _videos(config: Config) -> str:
    generator = config.data.generator
    if not isinstance(generator, ClipsConfig) or generator.videos.exists():
        return ""
    return f"data.generator.videos: there is nothing at {generator.videos}; name a video, or a folder of videos"
