"""Prompts, manifests and cached clips of a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from prfl.backbone import Backbone
from prfl.config.data_schema import ClipsConfig, CuratedConfig, DataConfig, MixtureConfig, PromptsConfig, SamplesConfig
from prfl.config.schema import Config, PreferenceConfig
from prfl.data import leaks
from prfl.data.cache import LatentCache
from prfl.data.dataset import LatentDataset, PairDataset, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.manifest import manifest_videos, read_manifest, write_manifest
from prfl.data.prompts import read_prompts, split_prompts
from prfl.data.sources import find_videos
from prfl.factory.backbone import sampling_solver
from prfl.factory.policy import finished_run_config, policy_model, weights_hash
from prfl.rollout.sampling import SamplingSettings, decode_all, sample
from prfl.toy import clips as shapes
from prfl.toy import renderer
from prfl.utils import processes
from prfl.utils.errors import PrflError, error_location
from prfl.utils.files import CACHE_TAG, mark_written
from prfl.utils.hashing import json_hash
from prfl.utils.text import visible

Dataset = LatentDataset | PairDataset


def load_prompts(config: PromptsConfig) -> dict[str, list[str]]:
    """``train``, and ``validation`` and ``test`` where they are given; no prompt is in two of them.

    A file that is named for several sets is split among them, once and for all (``split_prompts``).
    """
    named = {"train": config.train, "validation": config.validation, "test": config.test}
    splits: dict[str, list[str]] = {}
    for name, source in named.items():
        if source is None or name in splits:
            continue
        if source == "shapes":
            splits[name] = renderer.split_prompts()[name]
            continue
        with error_location(f"data.prompts.{name}"):
            splits |= split_prompts(read_prompts(source), [other for other in named if named[other] == source])
    owner: dict[str, str] = {}
    for name, some in splits.items():
        for prompt in some:
            if owner.setdefault(prompt, name) != name:
                raise PrflError(
                    f"the prompt {prompt[:80]!r} is in {owner[prompt]} too",
                    where=f"data.prompts.{name}",
                    fix="give each prompt to one set",
                )
    return splits


def check_prompts(config: Config, model: Backbone) -> None:
    """Raises PrflError for prompts of two sets that are one to the text encoder, and warns of what else is alike."""
    leaks.check_prompts(load_prompts(config.data.prompts), "data.prompts", model)


def has_clips(config: Config) -> bool:
    return config.data.manifest is not None or config.data.generator is not None


def build_manifest(config: Config, model: Backbone, progress: Callable) -> Path:
    """The manifest that the config names, or the one that its generator writes (once)."""
    data, generator = config.data, config.data.generator
    if data.manifest is not None:
        return data.manifest
    if generator is None:
        fix = "data.manifest=FILE, or a data.generator"
        raise PrflError("the config names no clips", where="data", fix=fix)
    known = load_prompts(data.prompts)
    if isinstance(generator, SamplesConfig):
        by = [(policy, scale) for policy in generator.policies for scale in generator.guidance]
        drawn = [build_samples(config, generator, policy, scale, model, known, progress) for policy, scale in by]
        return drawn[0] if len(drawn) == 1 else join_manifests(drawn)
    if isinstance(generator, ClipsConfig):
        return build_video_clips(config, generator, known, progress)
    wrong, unsteady = (generator.wrong, generator.unsteady) if isinstance(generator, MixtureConfig) else (0.0, 0.0)
    folder = data.cache / f"{generator.name}-{_key(generator)}-{_hash(known['train'])}"
    mark_written(folder, CACHE_TAG)
    return shapes.mixture(folder, known["train"], generator.count, generator.seed, wrong, unsteady)


def build_samples(
    config: Config,
    own: SamplesConfig,
    policy: Path | None,
    scale: float,
    model: Backbone,
    known: dict[str, list[str]],
    progress: Callable,
) -> Path:
    """Samples of the backbone, or of a run's policy, at one guidance scale, with the oracle's labels."""
    data = config.data
    settings = SamplingSettings(
        frames=data.frames, height=data.height, width=data.width, steps=own.steps, shift=config.rollout.shift,
        guidance_scale=scale, batch=own.batch, seed=own.seed, solver=sampling_solver(config),
    )  # fmt: skip

    @cache
    def generator() -> tuple[Backbone, str | None]:
        return (model, None) if policy is None else policy_model(config, policy, model)

    def draw(some: list[str], indices: list[int]) -> torch.Tensor:
        drawing, adapter = generator()
        return decode_all(drawing, sample(drawing, some, indices, settings, adapter=adapter), own.batch)

    # Another model, other prompts or another size make other videos.
    made_by = [model.describe()[f"{part}_fingerprint"] for part in ("transformer", "vae")]
    one = own.model_copy(update={"guidance": [scale]})
    decides = [made_by, known, asdict(replace(settings, batch=1))]
    if policy is not None:
        trained = finished_run_config(policy)
        decides += [weights_hash(trained), trained.backbone.model_dump(mode="json", include={"adapter"})]
    folder = data.cache / f"samples-{_key(one)}-{_hash(decides)}"
    mark_written(folder, CACHE_TAG)
    counts = {"train": own.per_prompt, "validation": own.held_out_per_prompt}
    return shapes.labelled(folder, known, counts, draw, own.other_captions, own.batch, progress)


def join_manifests(manifests: list[Path]) -> Path:
    """One manifest of all their rows; it lies above their folders, since rows may not leave a manifest's own."""
    path = manifests[0].parents[1] / f"samples-{_hash([manifest.parent.name for manifest in manifests])}.jsonl"
    if not path.exists():
        write_manifest(path, [row for manifest in manifests for row in read_manifest(manifest)])
    return path


def build_video_clips(config: Config, own: ClipsConfig, known: dict[str, list[str]], progress: Callable) -> Path:
    """The pairs of clips and their degradations where a reward is trained, or else the clips alone."""
    from prfl.data import clips as cutting
    from prfl.data.decoding import picture_hash

    settings = cutting.ClipSettings(
        **clip_size(config.data), kinds=tuple(own.kinds), crops=own.crops, held_out=own.held_out,
        formats=tuple(own.formats), seed=own.seed,
    )  # fmt: skip
    taken = {"skip_unreadable": config.data.skip_unreadable, "follow_links": config.data.follow_links}
    # Other videos, settings or prompts make other clips: the folder's name is a hash of them all.
    videos = [picture_hash(video) for video in find_videos(own.videos, **taken).videos]
    parts = [videos, asdict(settings), known.get("train"), known.get("validation")]
    folder = config.data.cache / f"{own.name}-{_hash(parts)}"
    mark_written(folder, CACHE_TAG)
    pairs, alone = cutting.write_clips(folder, own.videos, known, settings, **taken, progress=progress)
    return pairs if isinstance(config.objective, PreferenceConfig) else alone


def _key(generator: SamplesConfig | MixtureConfig | CuratedConfig) -> str:
    values = generator.model_dump(exclude={"name", "batch", "policies"})
    numbers = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return "-".join(name + ",".join(f"{one:g}" for one in some) for name, some in numbers.items())


def _hash(parts: object) -> str:
    return json_hash(parts, sort_keys=False)[:16]


def clip_size(data: DataConfig) -> dict[str, Any]:
    return {"frames": data.frames, "height": data.height, "width": data.width, "fps": data.fps}


def fill_cache(config: Config, model: Backbone, progress: Callable) -> Path:
    """Encode what is not yet encoded; returns the manifest."""
    with processes.main_first():
        path = build_manifest(config, model, progress)
    encode_manifest(config, model, path)
    return path


def encode_manifest(config: Config, model: Backbone, path: Path) -> None:
    """The clips and prompts of a manifest, into the config's cache; several processes share them out."""
    own = config.data
    with error_location("data"):
        report = build_cache(
            model, path, own.cache, skip_unreadable=own.skip_unreadable, follow_links=own.follow_links,
            batch_size=own.encode_batch, **clip_size(own),
        )  # fmt: skip
    if processes.is_main():
        from prfl.data.decoding import BY_SIZE, read_anew

        print(visible(str(report)), flush=True)
        videos = manifest_videos(read_manifest(path, follow_links=own.follow_links))
        guessed = sum(BY_SIZE in read_anew(video) for video in videos if video.is_file())
        if guessed:
            print(f"{guessed} videos have 720 lines or more and no colour tags: they are read as BT.709, as players do")


def encode_prompts(config: Config, model: Backbone, some: Iterable[str], progress: Callable) -> int:
    """``model.remember`` by way of the config's cache: prompts that are in it need no text encoder, and those that are
    not are encoded once, by all processes together.  Returns how many that were."""
    own, wanted = config.data, list(dict.fromkeys(["", *some]))
    with error_location("data"):
        stored = LatentCache.for_backbone(model, own.cache, **clip_size(own))
    missing = stored.missing(wanted)
    mine = processes.share(missing)
    with model.transformer_on_host() if mine else nullcontext():
        for prompt in progress(mine) if mine else ():  # one by one, as ``model.remember`` does
            stored.keep(prompt, model.condition([prompt]))
        model.drop_text_encoder()
    processes.wait()
    model.recall({prompt: stored.condition(prompt) for prompt in wanted})
    return len(missing)


def build_dataset(config: Config, model: Backbone, path: Path, split: str) -> Dataset | None:
    """The cached clips of a split, None where there are none.  A manifest whose rows name no split is all for training.

    Raises PrflError for a training row whose prompt is held out (``data.prompts``).
    """
    rows = read_manifest(path, follow_links=config.data.follow_links)
    has_splits = any(row.split for row in rows)
    if split != "train" and not any(row.split == split for row in rows):
        return None
    if split == "train":
        held = {p: name for name, some in load_prompts(config.data.prompts).items() if name != "train" for p in some}
        trained = [row.prompt for row in rows if row.split in (None, "train")]
        found = [prompt for prompt in trained if prompt in held]
        if found:
            raise PrflError(
                f"{len(found)} rows for training have a prompt of data.prompts.{held[found[0]]}, as {found[0][:80]!r}",
                where=str(path),
                fix="give these rows that split, or take their prompts out of the held-out prompts",
            )
        leaks.check_apart({"held out in data.prompts": list(held), "training rows": trained}, str(path), model)
    return cached_dataset(config, model, path, split if has_splits else None)


def cached_dataset(config: Config, model: Backbone, path: Path, split: str | None = None) -> Dataset:
    """The rows of a split, or (None) all of them, with their cached clips."""
    return load_dataset(
        model,
        path,
        config.data.cache,
        split=split,
        skip_unreadable=config.data.skip_unreadable,
        follow_links=config.data.follow_links,
        **clip_size(config.data),
    )
