"""One HTML file on which a person compares the videos of a prompt two at a time.

It links the videos beside it, or holds them (``one_file``).  It loads nothing else and sends nothing: answers are kept
in the browser while the person works, and saved as a manifest of pairs, ``preferences.jsonl``, to be put beside the
videos.  ``prfl.labels.serve`` gives the same page to browsers of several people, and takes their answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from prfl.evaluation.style import STYLE
from prfl.labels.pairs import Pair
from prfl.labels.playable import facts_of, playable
from prfl.utils.errors import Faults
from prfl.utils.files import CACHE_TAG, atomic_write, mark_written
from prfl.utils.text import html_text

if TYPE_CHECKING:
    from prfl.rollout.sampling import Progress  # which loads the video models' library

HERE = Path(__file__).parent
COPIES = "label-videos"
"""The folder of the copies of videos that browsers do not play, beside the page."""


def write_page(
    path: Path,
    pairs: Sequence[Pair],
    questions: Mapping[str, str],
    *,
    one_file: bool = False,
    progress: Progress = iter,
) -> Path:
    """Write the page (atomically) to ``path``, the folder of which the pairs' names are relative to.

    questions: what is asked of every pair, by dimension.  one_file: the videos are in the page, which can be sent away.
    Raises PrflError with every video that cannot be read.
    """
    videos = {}
    for name, (file, fps) in playable_videos(path.parent, pairs, progress).items():
        source = quote(Path(file).relative_to(path.parent).as_posix())
        if one_file:
            kind = "webm" if file.suffix == ".webm" else "mp4"
            source = f"data:video/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
        videos[name] = {"src": source, "fps": fps}
    with atomic_write(path) as temporary:
        temporary.write_text(page_text(path.parent, pairs, questions, videos), encoding="utf-8")
    return path


def playable_videos(folder: Path, pairs: Sequence[Pair], progress: Progress = iter) -> dict[str, tuple[Path, float]]:
    """Find, for each video of the pairs, the file that browsers play and its pictures a second.

    Copies are written where a video is in a form that they do not play.  Raises PrflError with every video that cannot
    be read.
    """
    videos, faults = {}, Faults()
    for name in progress(list(dict.fromkeys(name for pair in pairs for name in (pair.a, pair.b)))):
        with faults.collected():
            facts = facts_of(folder / name)
            copy = folder / COPIES / f"{hashlib.sha256(name.encode()).hexdigest()[:6]}-{Path(name).stem}.mp4"
            videos[name] = playable(folder / name, facts, copy), facts.fps
    faults.raise_all(folder, "videos")
    if any(file.is_relative_to(folder / COPIES) for file, _ in videos.values()):
        mark_written(folder / COPIES, CACHE_TAG)  # so that nobody takes them for more videos
    return videos


def page_text(
    folder: Path,
    pairs: Sequence[Pair],
    questions: Mapping[str, str],
    videos: Mapping[str, Mapping[str, Any]],
    server: bool = False,
) -> str:
    """Fill in the page.  videos: ``{"src": ..., "fps": ...}`` by name.  server: whether answers are sent."""
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]  # two folders of one name are two pages
    content = {
        "id": f"{folder.resolve().name}-{digest}",
        "questions": dict(questions),
        "pairs": [pair.row for pair in pairs],
        "videos": videos,
        "server": server,
    }
    page = (HERE / "page.html").read_text(encoding="utf-8")
    scripts = ("answers.js", "keeping.js", "player.js", "page.js")
    parts = {
        "TITLE": html_text(folder.resolve().name),
        "STYLE": STYLE + (HERE / "page.css").read_text(encoding="utf-8"),
        "CONTENT": json.dumps(content).replace("<", "\\u003c"),  # no prompt can end the script
        "SCRIPT": "\n".join((HERE / name).read_text(encoding="utf-8") for name in scripts),
    }
    slots = re.compile(r"\{\{([A-Z]+)\}\}")
    assert sorted(slots.findall(page)) == sorted(parts), "page.html has a slot for each part"
    return slots.sub(lambda slot: parts[slot[1]], page)  # in one pass: no part is a template itself
