"""One HTML file on which a person compares the videos of a prompt two at a time; the videos are inside it.

It loads nothing and sends nothing.  Answers are kept in the browser while the person works, and saved as a manifest of
pairs, ``preferences.jsonl``, to be put beside the videos.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from prfl.data.manifest import LabelledVideo
from prfl.data.video import read_video
from prfl.evaluation.media import browser_mp4
from prfl.evaluation.style import STYLE
from prfl.rollout.sampling import Progress
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.text import html_text
from prfl.utils.video_size import VideoSize

HERE = Path(__file__).parent


def write_page(
    path: Path,
    rows: Sequence[LabelledVideo],
    dimensions: Sequence[str],
    size: VideoSize,
    progress: Progress = iter,
) -> Path:
    """Write the page (atomically) to ``path``, in the folder of the manifest of ``rows``.

    dimensions: what is asked of every pair.  size: of the videos, as they are read.
    Raises PrflError where no prompt has two videos.
    """
    pairs = page_pairs(path.parent, rows)
    if not pairs:
        raise PrflError("no prompt has two videos to compare", where=str(path), fix="--per-prompt 2 or more")
    videos = {}
    for row in progress(rows):
        data = browser_mp4(read_video(row.video, size), size.fps)
        videos[_name(path.parent, row.video)] = base64.b64encode(data).decode()

    # What the page shows, and the files that it is made of.
    content = {"id": path.parent.name, "dimensions": list(dimensions), "pairs": pairs, "videos": videos}
    page = (HERE / "page.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html_text(path.parent.name),
        "STYLE": STYLE + (HERE / "page.css").read_text(encoding="utf-8"),
        "CONTENT": json.dumps(content).replace("<", "\\u003c"),  # no prompt can end the script
        "SCRIPT": (HERE / "page.js").read_text(encoding="utf-8"),
    }

    slots = re.compile(r"\{\{([A-Z]+)\}\}")
    assert sorted(slots.findall(page)) == sorted(parts), "page.html has a slot for each part"
    page = slots.sub(lambda slot: parts[slot[1]], page)  # in one pass: no part is a template itself
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def page_pairs(folder: Path, rows: Sequence[LabelledVideo]) -> list[dict[str, str]]:
    """Pair every two videos of a prompt, as rows of a pair manifest that lack only the preference.

    Which of the two is ``a`` (on the left), and the order of a prompt's pairs, are a hash of the names: no side and no
    sample comes first more often, and the same videos always give the same pairs.
    """
    members: dict[str, list[LabelledVideo]] = {}
    for row in rows:
        members.setdefault(row.prompt, []).append(row)
    pairs = []
    for prompt, videos in members.items():
        of_prompt = []
        for first, second in combinations(videos, 2):
            names = [_name(folder, first.video), _name(folder, second.video)]
            digest = hashlib.sha256(" ".join(sorted(names)).encode()).digest()
            a, b = sorted(names, reverse=bool(digest[0] & 1))
            split = {} if first.split is None else {"split": first.split}
            of_prompt.append((digest, {"prompt": prompt, "a": a, "b": b, **split}))
        pairs += [pair for _, pair in sorted(of_prompt, key=lambda digest_and_pair: digest_and_pair[0])]
    return pairs


def _name(folder: Path, video: Path) -> str:
    return video.resolve().relative_to(folder.resolve()).as_posix()
