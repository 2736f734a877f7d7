"""What a run needs and this machine does not have yet."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from prfl.config.places import other_place
from prfl.config.schema import Config
from prfl.config.section import Source, is_hub_id
from prfl.data.manifest import read_manifest
from prfl.factory.prompts import absent_frames, load_prompts, no_frames
from prfl.factory.reward import reward_path
from prfl.utils.errors import PrflError


def missing_inputs(config: Config, filled: Collection[Path] = (), file: Path | None = None) -> list[str]:
    """List what is missing, a line each: the yaml path, what is not there, and how to get it.

    Prompt files and manifests are read.

    filled: run folders that earlier stages will have filled by then.  file: of the config, where it has one: a line
    names the place beside it that was looked at too.
    """
    downloaded = downloads(config).items()
    lines = [f"{key}: {name} is not in the hub's cache here; the run downloads it" for key, name in downloaded]
    for kind, missing in MISSING.items():
        for source in config.files():
            if source.kind == kind and (what := missing(source, filled)):
                sought = other_place(file, source.target) if file else None
                lines.append(f"{source.key}: {what}" + (f" (nor is it {sought[1]})" if sought else ""))
    if not config.trains_reward:
        frames = absent_frames(readable_prompts(config))
        lines += [f"data.prompts.{name}: {no_frames(images)}" for name, images in frames.items()]
    data = config.data
    if data.manifest is not None and data.manifest.is_file() and (data.root is None or data.root.is_dir()):
        read_manifest(data.manifest, root=data.root, follow_links=data.follow_links)
    return lines


def readable_prompts(config: Config) -> dict[str, list[str]]:
    """The prompts; none where they cannot be read, which is said by all who need them."""
    try:
        return load_prompts(config.data)
    except PrflError:
        return {}


def downloads(config: Config) -> dict[str, str]:
    """Return yaml key -> hub id of what has to be downloaded: it is in no folder and not in the hub's cache here."""
    models = [source for source in config.files() if source.kind == "model" and is_hub_id(source.target)]
    return {source.key: source.target for source in models if not _in_cache(source)}


def _in_cache(source: Source) -> bool:
    cached = (try_to_load_from_cache(source.target, file, revision=source.revision) for file in source.weights)
    return any(isinstance(path, str) for path in cached)


def _no_file(source: Source, filled: Collection[Path]) -> str:
    return "" if Path(source.target).is_file() else f"there is no file {source.target}; {source.remedy}"


def _no_folder(source: Source, filled: Collection[Path]) -> str:
    return "" if Path(source.target).is_dir() else f"there is no folder {source.target}; {source.remedy}"


def _no_reward(source: Source, filled: Collection[Path]) -> str:
    """Say that a saved reward is missing.  An id of the hub is not looked for here."""
    path = source.target
    if Path(reward_path(path)).is_dir() or any(Path(path).is_relative_to(run) for run in filled):
        return ""
    if is_hub_id(path) and not path.startswith("runs/") and not Path(path).parent.is_dir():
        return ""
    return f"there is no folder {path}; train it first, or name a saved reward (a folder or a hub id)"


def _no_run(source: Source, filled: Collection[Path]) -> str:
    run = Path(source.target)
    finished = run in filled or (run / "config.yaml").is_file()
    return "" if finished else f"there is no finished run in {run}; train it first"


def _no_videos(source: Source, filled: Collection[Path]) -> str:
    there = Path(source.target).exists()
    return "" if there else f"there is nothing at {source.target}; name a video, or a folder of videos"


MISSING: dict[str, Callable[[Source, Collection[Path]], str]] = {
    "reward": _no_reward,
    "run": _no_run,
    "file": _no_file,
    "folder": _no_folder,
    "manifest": _no_file,
    "videos": _no_videos,
}
"""Say which part of a source is missing, in words; empty if nothing is."""
