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


def missing_inputs(config: Config, made: Collection[Path] = ()) -> list[str]:
    """One line each: the yaml path, what is not there, and how to get it.  Prompt files and manifests are read.

    made: run folders that earlier stages will have filled by then.
    """
    absent = [f"{key}: {name} is not in the hub's cache here; the run downloads it"
              for key, name in downloads(config).items()]  # fmt: skip
    saved = *_rewards(config, made), _held_out(config, made), *_policies(config, made)
    lines = *absent, *saved, _manifest(config), _videos(config)
    return [line for line in lines if line]


def downloads(config: Config) -> dict[str, str]:
    """Yaml key -> hub id of what has to be downloaded: it is in no folder and not in the hub's cache here."""
    model = config.backbone
    wanted = {"backbone.model": (model.model, model.revision, [f"transformer/{name}" for name in WEIGHTS])}
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        clip = config.reward.aesthetic
        wanted["reward.aesthetic.clip"] = (clip.clip, clip.revision, CLIP_WEIGHTS)
    return {
        key: name
        for key, (name, revision, files) in wanted.items()
        if is_hub_id(name)
        and not any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    }


def _rewards(config: Config, made: Collection[Path]) -> list[str]:
    if isinstance(config.reward, PixelRewardConfig) and config.reward.aesthetic:
        mlp = config.reward.aesthetic.mlp
        return [] if mlp.is_file() else [f"reward.aesthetic.mlp: there is no file {mlp}; {AESTHETIC_MLP}"]
    paths = listed(config.reward.path) if config.reward else []
    return [_saved("reward.path", path, made) for path in paths]


def _held_out(config: Config, made: Collection[Path]) -> str:
    return _saved("evaluation.held_out_reward", config.evaluation.held_out_reward, made)


def _saved(key: str, path: str | None, made: Collection[Path]) -> str:
    """A saved reward.  An id of the hub is not looked for here."""
    if path is None or Path(reward_path(path)).is_dir() or any(Path(path).is_relative_to(run) for run in made):
        return ""
    if is_hub_id(path) and not path.startswith("runs/") and not Path(path).parent.is_dir():
        return ""
    return f"{key}: there is no folder {path}; train it first, or name a saved reward (a folder or a hub id)"


def _policies(config: Config, made: Collection[Path]) -> list[str]:
    own = config.data.generator
    runs = [run for run in own.policies if run is not None] if isinstance(own, SamplesConfig) else []
    absent = [run for run in runs if run not in made and not (run / "config.yaml").is_file()]
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
    own = config.data.generator
    if not isinstance(own, ClipsConfig) or own.videos.exists():
        return ""
    return f"data.generator.videos: there is nothing at {own.videos}; name a video, or a folder of videos"
