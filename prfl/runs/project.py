"""``prfl init``: a commented project that runs, for a folder of videos or a manifest of people's preferences."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from prfl.backbone import Backbone, load_architecture
from prfl.backbone.families import FAMILIES
from prfl.config import load_stages
from prfl.data.buckets import FASTER
from prfl.data.folder import read_folder
from prfl.data.headers import Header, read_header, typical
from prfl.data.manifest import LabelledVideo, PreferencePair, manifest_videos, read_manifest
from prfl.factory.backbone import shapes_or
from prfl.runs.project_files import (
    FIRST_FRAMES,
    FOLDER_CLIPS,
    HANDOFF,
    LARGE,
    ONE_RESIDENT,
    PAIRS,
    POLICY,
    PROJECT,
    PROMPTS_ONLY,
    README,
    REWARD,
    SFT,
    SMALL,
    VIDEOS,
)  # fmt: skip
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.reading import absent
from prfl.utils.video_size import VideoSize

SAMPLED = 200  # headers that are read: enough to know what the videos are like
COLUMN = 34  # where the comments of a config begin
ANOTHER_SHAPE = 0.25  # of log(height / width): from 16:9 to 4:3 and further
MANY = 0.1  # share of the videos that is worth a size of its own
FEW = 50  # videos, of which a reward needs several clips each
WIDE = 512  # tokens of a model that is trained on a GPU are wider


@dataclass(frozen=True)
class Content:
    """What a project is made of.

    source: the folder or the manifest.  rows: its videos or pairs.  dimensions: that people labelled; none in a folder.
    """

    source: Path
    rows: Sequence[LabelledVideo | PreferencePair]
    dimensions: Sequence[str]

    @property
    def holds_out(self) -> bool:
        return any(row.split == "validation" for row in self.rows)


def write_project(source: Path, out: Path, model: str) -> list[Path]:
    """Write the project's files into ``out``; returns them.

    source: a folder of a.mp4 and a.txt, or a manifest.  model: a diffusers folder, a hub id or 'shapes'.
    Raises PrflError for videos without a text beside them, and where one of the files is there already.
    """
    content = find(source)
    network = load_architecture(shapes_or(model))
    headers = [read_header(video) for video in spread(manifest_videos(content.rows))]
    sizes = sizes_for(network, model, headers)

    values = settings(content, network, model, sizes, out)
    texts = {"project.yaml": PROJECT, "reward.yaml": REWARD, "policy.yaml": POLICY, "README.md": README}
    if there := [name for name in texts if (out / name).exists()]:
        fix = "--out names another folder, or remove it"
        raise PrflError(f"there is a {there[0]} already", where=str(out), fix=fix)
    for name, text in texts.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(aligned(Template(text).substitute(values)), encoding="utf-8")
    load_stages(out / "project.yaml")
    return [out / name for name in texts]


def find(source: Path) -> Content:
    """Read the folder or the manifest.  Raises PrflError for what neither is."""
    if not source.exists():
        raise absent(source, "name a folder of videos with texts beside them, or a manifest (.jsonl)", "folder or file")
    if source.is_dir():
        return Content(source, read_folder(source, held_out=0.2), [])
    if source.suffix != ".jsonl":
        fix = "prfl labels import makes one of a table; videos are named by their folder"
        raise PrflError("is no manifest (.jsonl)", where=str(source), fix=fix)
    rows = read_manifest(source)
    labels = [row.label if isinstance(row, LabelledVideo) else row.preference for row in rows]
    dimensions = list(dict.fromkeys(name for label in labels for name in label))
    if not dimensions:
        fix = "label them first (prfl labels page), or name the folder of the videos in place of the manifest"
        raise PrflError("no row says which video is good", where=str(source), fix=fix)
    return Content(source, rows, dimensions)


def spread(videos: Sequence[Path]) -> Sequence[Path]:
    """Choose so many videos that their headers are read soon, evenly."""
    return videos[:: math.ceil(len(videos) / SAMPLED)]


def sizes_for(network: Backbone, model: str, headers: Sequence[Header]) -> list[VideoSize]:
    """Choose the clips' size, and further ones where many videos are of another shape (upright, say) or slower."""
    shapes = [math.log(header.height / header.width) for header in headers]
    middle = sorted(shapes)[len(shapes) // 2]
    apart = [0 if abs(shape - middle) <= ANOTHER_SHAPE else math.copysign(1, shape - middle) for shape in shapes]
    many = MANY * len(headers)
    sizes: list[VideoSize] = []
    for side in (0, -1, 1):
        alike = [header for header, of in zip(headers, apart, strict=True) if of == side]
        if not alike or (sizes and len(alike) < many):
            continue
        size = clip_for(network, model, typical(alike))
        slow = [header for header in alike if header.fps * FASTER < size.fps]
        fast = [header for header in alike if header not in slow]
        groups = [alike] if not fast or len(slow) < many else [fast, slow]
        sizes += [clip_for(network, model, typical(group)) for group in groups]
    return sorted(dict.fromkeys(sizes), key=lambda size: -size.frames * size.height * size.width)


def clip_for(network: Backbone, model: str, videos: Header) -> VideoSize:
    """Choose the clips' size: as the model draws them, of the videos' shape, and no larger, longer or faster."""
    facts = network.facts
    frames, pixels, fps = (17, 32 * 32, 8) if model == "shapes" else FAMILIES[facts.family].usual
    rate = min(fps, videos.fps) if videos.fps else fps

    scale = min(1, math.sqrt(pixels / (videos.height * videos.width)))
    multiples = [facts.spatial_factor * side for side in facts.patch[1:]]
    sides = zip((videos.height, videos.width), multiples, strict=True)
    height, width = (max(multiple, math.floor(scale * side / multiple) * multiple) for side, multiple in sides)
    if model == "shapes":  # its positions end there
        height, width = min(height, 32), min(width, 32)

    # As many frames as the videos have, in steps that the model takes.
    longest = min(frames, max(1, math.floor(videos.seconds * rate)))
    counts = range(longest, 0, -1)
    return VideoSize(next(count for count in counts if takes(network, count, height, width)), height, width, rate)


def takes(network: Backbone, frames: int, height: int, width: int) -> bool:
    """Tell whether the model takes clips of this size."""
    try:
        network.latent_shape(frames, height, width)
    except PrflError:
        return False
    return True


def settings(
    content: Content, network: Backbone, model: str, sizes: Sequence[VideoSize], out: Path
) -> dict[str, object]:
    """Fill in the templates' names."""
    size, *further = sizes
    buckets = "".join(
        f"\n    - {{frames: {each.frames}, height: {each.height}, width: {each.width}, fps: {each.fps:g}}}"
        for each in further
    )
    buckets = f"\n  buckets:  # further sizes: a video is read at the one of its shape{buckets}" if further else ""
    facts, labelled = network.facts, bool(content.dimensions)
    common, two = LARGE if max(facts.widths) >= WIDE else SMALL, facts.boundary is not None
    path = quoted(os.path.relpath(content.source, out))
    reward_clips, policy_clips = (PAIRS, PROMPTS_ONLY) if labelled else (VIDEOS, FOLDER_CLIPS)
    dimensions = list(map(quoted, content.dimensions or ["look", "motion"]))
    crops = 4 if len(content.rows) < FEW else 1
    rated = labelled and isinstance(content.rows[0], LabelledVideo)
    return {
        **common,
        "name": re.sub(r"[^\w.-]+", "-", out.resolve().name.removesuffix("-prfl")),
        "project": shlex.quote(str(out)),
        "model": quoted(model),
        "folder": content.source,
        "summary": f"{len(content.rows)} {'rows' if labelled else 'videos'}, read as {size.frames} frames of "
        f"{size.height} x {size.width} at {size.fps:g} fps",
        "reward_clips": Template(reward_clips).substitute(path=path, crops=crops).rstrip(),
        "policy_clips": Template(policy_clips).substitute(path=path).rstrip()
        + (FIRST_FRAMES if "image" in facts.takes else ""),
        "encode_policy": "" if labelled else f"\n  encode_batch: {common['encode_batch']}",
        "sft": "" if labelled else SFT,
        "experts": ONE_RESIDENT if two and common is LARGE else "",
        "read": "clean prediction" if two else "next latent",
        "handoff": HANDOFF if two else "",
        "policy_buckets": "" if labelled else buckets,
        "reward_buckets": buckets if labelled else "",
        "frames": size.frames,
        "height": size.height,
        "width": size.width,
        "fps": f"{size.fps:g}",
        "dimensions": ", ".join(dimensions),
        "first": dimensions[0],
        "block": reading_block(facts.num_blocks),
        "loss": "bce" if rated else "bradley_terry",
        "reward_every": 100 if content.holds_out else 0,
        "policy_every": (20 if common is SMALL else 100) if content.holds_out else 0,
    }


def aligned(text: str) -> str:
    """Put the comments behind values below each other, where there is room."""
    return re.sub(r"(?m)^( *[^\s#].*?)  (# .*)$", lambda line: f"{line[1]:<{COLUMN}}  {line[2]}", text)


def reading_block(blocks: int) -> int:
    """Choose the block behind which a head reads: a fifth of the depth, as PRFL does, or half of a few blocks."""
    return blocks // 5 - 1 if blocks >= 12 else max(0, blocks // 2 - 1)


def quoted(text: str) -> str:
    """Write a text as YAML inside a line."""
    return text if re.fullmatch(r"[A-Za-z./][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
