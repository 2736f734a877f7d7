"""Read a folder of videos with their prompts beside them (``a.mp4`` and ``a.txt``), the layout of LoRA trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prfl.data.manifest import LabelledVideo
from prfl.data.prompts import hold_out
from prfl.data.sources import find_videos, listed
from prfl.utils.console import console
from prfl.utils.errors import Faults, PrflError
from prfl.utils.reading import text_of

TEXTS = (".txt", ".caption")
KEYS = ("caption", "prompt", "text")
SPLIT_FOLDERS = {
    "train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test",
}  # fmt: skip
"""Names of top-level folders, and the split that the videos in each belong to."""


def read_folder(
    folder: Path, held_out: float, *, follow_links: bool = False, skip_unreadable: bool = False
) -> list[LabelledVideo]:
    """List every video below the folder with its prompt and its split, by name.

    The prompt is the text beside the video (``prompt_beside``).  The split is given by the top-level folder that the
    video is in (SPLIT_FOLDERS).  If no such folder is for validation, a share ``held_out`` of the prompts without a
    split goes to validation.
    Raises PrflError that names every video without a prompt, and the errors of ``find_videos``.
    """
    sources = find_videos(folder, follow_links=follow_links, skip_unreadable=skip_unreadable)
    top = folder if folder.is_dir() else folder.parent
    faults = Faults()
    rows: list[LabelledVideo] = []
    for video in sources.videos:
        with faults.collected():
            rows.append(LabelledVideo(video, _prompt_of(video), {}, split_of(video.relative_to(top))))
    faults.raise_all(folder, "captions")
    return _with_splits(rows, held_out)


def say_left_out(folder: Path, *, follow_links: bool = False, skip_unreadable: bool = False) -> None:
    """Print the files in the folder that are left out.  Captions of videos are not among them."""
    sources = find_videos(folder, follow_links=follow_links, skip_unreadable=skip_unreadable)
    used = {video.with_suffix(suffix) for video in sources.videos for suffix in (*TEXTS, ".json")}
    for reason, paths in sources.left_out.items():
        if others := [path for path in paths if path not in used]:
            console.say(f"left out: {listed(reason, others)}")


def prompt_beside(video: Path) -> str | None:
    """Read the prompt in ``a.txt``, ``a.caption`` or ``a.json`` ({"caption": ...}) beside ``a.mp4``, as one line.

    None where no such file is there.  Raises PrflError for an empty one, and for JSON without a caption.
    """
    for suffix in TEXTS:
        beside = video.with_suffix(suffix)
        if beside.is_file():
            if text := " ".join(text_of(beside).split()):
                return text
            what = "it is empty, and should be the prompt of the video beside it"
            raise PrflError(what, where=str(beside), fix="write the prompt into it")
    beside = video.with_suffix(".json")
    return _json_caption(beside) if beside.is_file() else None


def _json_caption(path: Path) -> str:
    try:
        content = json.loads(text_of(path))
    except (ValueError, RecursionError) as error:
        raise PrflError(f"is not JSON: {error}", where=str(path), fix='write {"caption": "..."}') from error
    for key in KEYS if isinstance(content, dict) else ():
        if isinstance(content.get(key), str) and content[key].strip():
            return " ".join(content[key].split())
    what = f"has no text under {', '.join(KEYS)}, and should have the prompt of the video beside it"
    raise PrflError(what, where=str(path), fix='write {"caption": "..."}')


def _prompt_of(video: Path) -> str:
    prompt = prompt_beside(video)
    if prompt is None:
        fix = f"write what it shows into {video.with_suffix('.txt').name}, or take the video away"
        raise PrflError("there is no text beside this video", where=str(video), fix=fix)
    return prompt


def split_of(below: Path) -> str | None:
    """Return a video's split by its top-level folder; None if that names no split.  below: path from the top folder."""
    return SPLIT_FOLDERS.get(below.parts[0].lower()) if len(below.parts) > 1 else None


def _with_splits(rows: Sequence[LabelledVideo], held_out: float) -> list[LabelledVideo]:
    """Give a split to the rows that have none."""
    if any(row.split == "validation" for row in rows):
        held_out = 0
    free = dict.fromkeys(row.prompt for row in rows if row.split is None)
    held = hold_out(list(free), held_out)
    names = {prompt: "validation" if prompt in held else "train" for prompt in free}
    return [row if row.split else replace(row, split=names[row.prompt]) for row in rows]
