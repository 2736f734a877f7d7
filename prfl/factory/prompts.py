"""The prompts of a config: of the files that it names, or of its clips."""

from __future__ import annotations

from prfl.backbone import Backbone
from prfl.config.schema import Config
from prfl.config.sections.data import ClipsConfig, DataConfig
from prfl.data import leaks
from prfl.data.folder import read_folder
from prfl.data.manifest import LabelledVideo, prompts_by_split
from prfl.data.prompts import read_prompts, split_prompts
from prfl.toy import renderer
from prfl.utils.errors import PrflError, error_location

SETS = ("train", "validation", "test")


def load_prompts(data: DataConfig) -> dict[str, list[str]]:
    """``train``, and ``validation`` and ``test`` where there are any; no prompt is in two of them.

    A file that is named for several sets is split among them, once and for all (``split_prompts``).  A set that is not
    named has the prompts of that split of the clips.
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
        for prompt in splits.get(name, []):
            if owner.setdefault(prompt, name) != name:
                raise PrflError(
                    f"the prompt {prompt[:80]!r} is in {owner[prompt]} too",
                    where=f"data.prompts.{name}",
                    fix="give each prompt to one set",
                )
    return {name: splits[name] for name in SETS if name in splits}


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
    if data.manifest:
        return {split or "train": prompts for split, prompts in prompts_by_split(data.manifest).items()}
    splits: dict[str, dict[str, None]] = {}
    for row in captioned_videos(data):
        splits.setdefault(row.split or "train", {})[row.prompt] = None
    return {split: list(prompts) for split, prompts in splits.items()}


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
    leaks.check_prompts(prompts, "data.prompts", model)


def check_sets(config: Config, prompts: dict[str, list[str]]) -> None:
    """Raise PrflError where the evaluation needs prompts that neither ``data.prompts`` nor the clips have."""
    evaluation, clips = config.evaluation, config.data.clips_key
    if evaluation.every and not prompts.get("validation"):
        fix = f"give data.prompts.validation, or videos of {clips} with that split, or evaluation.every=0"
        raise PrflError("evaluation.every needs validation prompts", where="data.prompts.validation", fix=fix)
    if evaluation.final_samples and not prompts.get("test"):
        fix = f"give data.prompts.test, or videos of {clips} with that split, or evaluation.final_samples=0"
        raise PrflError("evaluation.final_samples needs test prompts", where="data.prompts.test", fix=fix)
