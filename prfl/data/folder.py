"""A folder of videos with their prompts beside them, as tools for LoRA training keep it: ``a.mp4`` and ``a.txt``."""

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
"""A folder at the top that is called so holds the videos of that split."""


def read_folder(
    folder: Path, held_out: float, *, follow_links: bool = False, skip_unreadable: bool = False
) -> list[LabelledVideo]:
    """List every video below the folder with its prompt and its split, by name.

    The prompt is the text beside the video (``prompt_beside``).  The split is the folder at the top that the video is
    in (SPLIT_FOLDERS).  Where no folder there is for validation, a share ``held_out`` of the other prompts is.
    Raises PrflError that names every video without a prompt, and what ``find_videos`` refuses.
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
    """Print what lies in the folder and is no video that is read; captions are."""
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
    """Return the split of a video by the folder at the top that it is in.  below: its path from there."""
    return SPLIT_FOLDERS.get(below.parts[0].lower()) if len(below.parts) > 1 else None


def _with_splits(rows: Sequence[LabelledVideo], held_out: float) -> list[LabelledVideo]:
    """Give a split to the rows that have none."""
    if any(row.split == "validation" for row in rows):
        held_out = 0
    free = dict.fromkeys(row.prompt for row in rows if row.split is None)
    held = hold_out(list(free), held_out)
    names = {prompt: "validation" if prompt in held else "train" for prompt in free}
    return [row if row.split else replace(row, split=names[row.prompt]) for row in rows]
