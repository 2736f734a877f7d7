"""The prompts of a config: of the files that it names, or of its clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl.backbone import Ask, Backbone
from prfl.backbone.condition import as_asks, check_asks, texts
from prfl.config.schema import Config
from prfl.config.sections.data import ClipsConfig, DataConfig
from prfl.data import leaks
from prfl.data.folder import read_folder
from prfl.data.manifest import LabelledVideo, PreferencePair, prompts_by_split, read_manifest
from prfl.data.prompts import read_prompts, split_prompts
from prfl.toy import renderer
from prfl.utils.errors import PrflError, error_location
from prfl.utils.video_size import VideoSize

SETS = ("train", "validation", "test")


def load_prompts(data: DataConfig) -> dict[str, list[str]]:
    """``train``, and ``validation`` and ``test`` where there are any; no prompt is in two of them.

    A file that is named for several sets is split among them, once and for all (``split_prompts``).  A set that is not
    named has the prompts of that split of the clips.  Those with a first frame are of the run's own clip size.
    """
    splits = _named_prompts(data)
    if any(name not in splits for name in SETS):
        for name, prompts in _prompts_of_clips(data).items():
            splits.setdefault(name, prompts)
    if not splits.get("train"):
        fix = 'give a file of prompts, or rows without a split or with "split": "train"'
        raise PrflError("there are no prompts to train on", where="data.prompts.train", fix=fix)
    owner: dict[str, str] = {}
    for name in SETS:
        for prompt in texts(splits.get(name, [])):
            if owner.setdefault(prompt, name) != name:
                raise PrflError(
                    f"the prompt {prompt[:80]!r} is in {owner[prompt]} too",
                    where=f"data.prompts.{name}",
                    fix="give each prompt to one set",
                )
    return {name: [of_clip(prompt, data.sizes[0]) for prompt in splits[name]] for name in SETS if name in splits}


def of_clip(prompt: str, clip: VideoSize) -> str:
    return Ask(prompt, prompt.image, clip) if isinstance(prompt, Ask) else prompt


def _named_prompts(data: DataConfig) -> dict[str, list[str]]:
    """Read the files of ``data.prompts``."""
    named = {name: getattr(data.prompts, name) for name in SETS}
    splits: dict[str, list[str]] = {}
    for name, source in named.items():
        if source is None or name in splits:
            continue
        if source == "shapes":
            splits[name] = renderer.split_prompts()[name]
            continue
        with error_location(f"data.prompts.{name}"):
            splits |= split_prompts(read_prompts(source), [other for other in named if named[other] == source])
    return splits


def _prompts_of_clips(data: DataConfig) -> dict[str, list[str]]:
    """Collect the prompts of each split of a manifest, or of the texts beside videos; {} where there are none.

    Clips that are not there yet have none where the prompts to train on are named: a dry run needs no clips.
    """
    source = data.manifest or data.folder
    if data.prompts.train and source and not source.exists():
        return {}
    if data.manifest and not data.prompts.first_frames:
        return {split or "train": prompts for split, prompts in prompts_by_split(data.manifest).items()}
    splits: dict[str, dict[str, str]] = {}
    for row in _rows_of_clips(data):
        video = row.a if isinstance(row, PreferencePair) else row.video
        ask = Ask(row.prompt, video) if data.prompts.first_frames else row.prompt
        splits.setdefault(row.split or "train", {}).setdefault(row.prompt, ask)
    return {split: list(prompts.values()) for split, prompts in splits.items()}


def _rows_of_clips(data: DataConfig) -> Sequence[LabelledVideo | PreferencePair]:
    """List the videos or pairs that bring prompts."""
    if data.manifest:
        return read_manifest(data.manifest, root=data.root, follow_links=data.follow_links)
    return captioned_videos(data)


def captioned_videos(data: DataConfig) -> list[LabelledVideo]:
    """List the videos of ``data.folder``, or of a generator that cuts clips, with the texts beside them.

    Empty where clips have their prompts from elsewhere.
    """
    if data.folder:
        folder, held_out = data.folder, data.held_out
    elif isinstance(data.generator, ClipsConfig) and not data.prompts.train:
        folder, held_out = data.generator.videos, data.generator.held_out
    else:
        return []
    return read_folder(folder, held_out, follow_links=data.follow_links, skip_unreadable=data.skip_unreadable)


def check_prompts(config: Config, model: Backbone) -> None:
    """Raise PrflError for prompts that are missing, or of two sets and one to the text encoder.

    Warns of what else is alike.
    """
    prompts = load_prompts(config.data)
    check_sets(config, prompts)
    check_frames(config, prompts, model)
    for name, images in absent_frames(prompts).items():
        raise PrflError(no_frames(images), where=f"data.prompts.{name}", fix="name pictures that are there")
    leaks.check_prompts(prompts, "data.prompts", model)


def check_frames(config: Config, prompts: dict[str, list[str]], model: Backbone) -> None:
    """Raise PrflError for first frames that the model does not take, or that it needs and are not there.

    Where a reward is trained no video is drawn, and each clip has its own.
    """
    takes = model.facts.takes
    if config.trains_reward and "image" in takes:
        return
    for name, of_set in prompts.items():
        check_asks(of_set, takes, f"data.prompts.{name}")


def absent_frames(prompts: dict[str, list[str]]) -> dict[str, list[Path]]:
    """List the first frames of each set that are not there; sets without such are left out."""
    asks = {name: as_asks(of_set) for name, of_set in prompts.items()}
    absent = {name: [ask.image for ask in each if ask.image and not ask.image.is_file()] for name, each in asks.items()}
    return {name: images for name, images in absent.items() if images}


def no_frames(absent: Sequence[Path]) -> str:
    return f"{len(absent)} first frames are not there; the first is {absent[0]}"


def check_sets(config: Config, prompts: dict[str, list[str]]) -> None:
    """Raise PrflError where the evaluation needs prompts that neither ``data.prompts`` nor the clips have."""
    evaluation, clips = config.evaluation, config.data.clips_key
    if evaluation.every and not prompts.get("validation"):
        fix = f"give data.prompts.validation, or videos of {clips} with that split, or evaluation.every=0"
        raise PrflError("evaluation.every needs validation prompts", where="data.prompts.validation", fix=fix)
    if evaluation.final_samples and not prompts.get("test"):
        fix = f"give data.prompts.test, or videos of {clips} with that split, or evaluation.final_samples=0"
        raise PrflError("evaluation.final_samples needs test prompts", where="data.prompts.test", fix=fix)
