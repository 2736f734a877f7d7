"""The clips of a config: its manifest, or the one that its generator writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch

from prfl.backbone import Backbone
from prfl.backbone.network import fingerprints
from prfl.config.schema import Config
from prfl.config.section import Section
from prfl.config.sections.data import (
    ClipsConfig,
    CuratedConfig,
    DataConfig,
    GeneratorBase,
    MixtureConfig,
    SamplesConfig,
)
from prfl.data.folder import say_left_out
from prfl.data.manifest import read_manifest, write_manifest
from prfl.data.sources import find_videos
from prfl.factory.policy import finished_run_config, policy_model, weights_hash
from prfl.factory.prompts import captioned_videos, load_prompts
from prfl.rollout.sampling import SamplingSettings, decode_all, sample
from prfl.toy import clips as shapes
from prfl.utils.errors import PrflError
from prfl.utils.files import CACHE_TAG, mark_written
from prfl.utils.hashing import json_hash


@dataclass(frozen=True)
class Order:
    """What a generator is given: the run's config and model, the three sets of prompts, and how to show progress."""

    config: Config
    model: Backbone
    prompts: dict[str, list[str]]
    progress: Callable

    def folder(self, name: str) -> Path:
        """A folder of the cache, marked as prfl's."""
        folder = self.config.data.cache / name
        mark_written(folder, CACHE_TAG)
        return folder


def build_manifest(config: Config, model: Backbone, progress: Callable) -> Path:
    """The manifest that the config names, or the one that is written of its folder, or by its generator (once)."""
    if config.data.manifest is not None:
        return config.data.manifest
    if config.data.folder is not None:
        return build_folder_manifest(config.data)
    generator = config.data.generator
    if generator is None:
        fix = "data.manifest=FILE, data.folder=FOLDER, or a data.generator"
        raise PrflError("the config names no clips", where="data", fix=fix)
    order = Order(config, model, load_prompts(config.data), progress)
    return GENERATORS[type(generator)](generator, order)


def build_folder_manifest(data: DataConfig) -> Path:
    """The videos of ``data.folder`` with the texts beside them; paths are relative to that folder."""
    assert data.folder is not None
    say_left_out(data.folder, follow_links=data.follow_links, skip_unreadable=data.skip_unreadable)
    rows = captioned_videos(data)
    names = [(str(row.video.relative_to(data.folder)), row.prompt, row.split) for row in rows]
    mark_written(data.cache, CACHE_TAG)
    path = data.cache / f"folder-{_hash(names)}.jsonl"
    write_manifest(path, rows, root=data.folder)
    return path


def build_all_samples(generator: SamplesConfig, order: Order) -> Path:
    """Samples of every policy at every guidance scale, in one manifest."""
    manifests = [
        build_samples(generator, order, policy, scale) for policy in generator.policies for scale in generator.guidance
    ]
    return manifests[0] if len(manifests) == 1 else join_manifests(manifests)


def build_samples(generator: SamplesConfig, order: Order, policy: Path | None, scale: float) -> Path:
    """Samples of the backbone, or of a run's policy, at one guidance scale, with the oracle's labels."""
    config, data = order.config, order.config.data
    settings = SamplingSettings(
        frames=data.frames,
        height=data.height,
        width=data.width,
        steps=generator.steps,
        shift=config.rollout.shift,
        guidance_scale=scale,
        batch=generator.batch,
        seed=generator.seed,
        solver=config.rollout.sampling_solver,
    )

    @cache
    def sampler() -> tuple[Backbone, str | None]:
        return (order.model, None) if policy is None else policy_model(config, policy, order.model)

    def draw(prompts: list[str], indices: list[int]) -> torch.Tensor:
        model, adapter = sampler()
        return decode_all(model, sample(model, prompts, indices, settings, adapter=adapter), generator.batch)

    # Another model, other prompts or another size make other videos.
    decides = [list(fingerprints(order.model).values()), order.prompts, asdict(replace(settings, batch=1))]
    if policy is not None:
        trained = finished_run_config(policy)
        decides += [weights_hash(trained), trained.backbone.model_dump(mode="json", include={"adapter"})]
    at_scale = generator.model_copy(update={"guidance": [scale]})
    folder = order.folder(f"samples-{_key(at_scale)}-{_hash(decides)}")
    counts = {"train": generator.per_prompt, "validation": generator.held_out_per_prompt}
    other_captions, batch = generator.other_captions, generator.batch
    return shapes.labelled(folder, order.prompts, counts, draw, other_captions, batch, order.progress)


def join_manifests(manifests: list[Path]) -> Path:
    """One manifest of all their rows; it lies above their folders, since rows may not leave a manifest's own."""
    path = manifests[0].parents[1] / f"samples-{_hash([manifest.parent.name for manifest in manifests])}.jsonl"
    if not path.exists():
        write_manifest(path, [row for manifest in manifests for row in read_manifest(manifest)])
    return path


def build_rendered_clips(generator: MixtureConfig | CuratedConfig, order: Order) -> Path:
    """Moving shapes, with a share of flaws or without one."""
    train = order.prompts["train"]
    folder = order.folder(f"{generator.name}-{_key(generator)}-{_hash(train)}")
    flaws = (generator.wrong, generator.unsteady) if isinstance(generator, MixtureConfig) else (0.0, 0.0)
    return shapes.mixture(folder, train, generator.count, generator.seed, *flaws)


def build_video_clips(generator: ClipsConfig, order: Order) -> Path:
    """The pairs of clips and their degradations where a reward is trained, or else the clips alone."""
    from prfl.data import clips as cutting
    from prfl.utils.decoding import picture_hash

    data, prompts = order.config.data, order.prompts
    captions = {row.video: (row.prompt, row.split or "train") for row in captioned_videos(data)}
    settings = cutting.ClipSettings(
        frames=data.frames,
        height=data.height,
        width=data.width,
        fps=data.fps,
        kinds=tuple(generator.kinds),
        crops=generator.crops,
        held_out=generator.held_out,
        formats=tuple(generator.formats),
        seed=generator.seed,
    )
    reading = {"skip_unreadable": data.skip_unreadable, "follow_links": data.follow_links}
    # Other videos, settings or prompts make other clips: the folder's name is a hash of them all.
    videos = [picture_hash(video) for video in find_videos(generator.videos, **reading).videos]
    parts: list[object] = [videos, asdict(settings), prompts.get("train"), prompts.get("validation")]
    parts += [list(captions.values())] if captions else []
    folder = order.folder(f"{generator.name}-{_hash(parts)}")
    pairs, alone = cutting.write_clips(
        folder, generator.videos, prompts, settings, captions=captions, **reading, progress=order.progress
    )
    return pairs if order.config.trains_reward else alone


GENERATORS: dict[type[Section], Callable[..., Path]] = {
    SamplesConfig: build_all_samples,
    MixtureConfig: build_rendered_clips,
    CuratedConfig: build_rendered_clips,
    ClipsConfig: build_video_clips,
}
"""The function that writes the clips of each generator's section: (section, order) to a manifest."""


def _key(generator: GeneratorBase) -> str:
    """The settings of a generator of moving shapes, for the name of its folder."""
    settings = generator.model_dump(exclude={"name", "batch", "policies"})
    parts = []
    for name, value in settings.items():
        numbers = value if isinstance(value, list) else [value]
        parts.append(name + ",".join(f"{number:g}" for number in numbers))
    return "-".join(parts)


def _hash(parts: object) -> str:
    """Hash the settings of a generated set: 16 hexadecimal digits.  Sorted keys would rename existing folders."""
    return json_hash(parts, sort_keys=False)[:16]
