"""The videos of each prompt in the order of their scores: as CSV, as copies of the best, and as a page."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prfl.data.video import read_video
from prfl.evaluation.media import browser_mp4
from prfl.evaluation.page.videos import video_figure
from prfl.evaluation.report import write_page
from prfl.runs.score_inputs import LATENTS, Scored
from prfl.utils.console import messages
from prfl.utils.files import atomic_write
from prfl.utils.reading import printable
from prfl.utils.text import html_text
from prfl.utils.video_size import VideoSize


@dataclass(frozen=True)
class Ranked:
    """One sample of a file among those of its prompt: 1 is the best.

    total: the sum of its scores, which are means over the noise levels.
    """

    rank: int
    file: str
    sample: int
    prompt: str
    total: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Ranking:
    """best: only so many of each prompt.  copy_to: a folder that they are copied into.  page: an html file of them."""

    best: int | None = None
    copy_to: Path | None = None
    page: Path | None = None

    def show(self, rows: Sequence[Scored], unit: str, clip: Mapping[str, Any]) -> None:
        """Print the ranking, and do with the best what was asked for.  unit: what one of a score is."""
        ranked = [each for each in rank(rows) if self.best is None or each.rank <= self.best]
        write_csv(ranked)
        if self.copy_to is not None:
            copy_best(ranked, self.copy_to)
        if self.page is not None:
            write_ranking_page(self.page, ranked, unit, clip)
            messages.say(f"open in a browser: {printable(self.page)}")
        messages.say(f"within a prompt, by the sum of its scores; of a score {unit}")


def rank(rows: Sequence[Scored]) -> list[Ranked]:
    """Order the samples of each prompt, the best first; prompts in the order in which they come."""
    samples: dict[tuple[str, str, int], list[Scored]] = {}
    for row in rows:
        samples.setdefault((row.prompt, row.file, row.sample), []).append(row)
    by_prompt: dict[str, list[tuple[float, str, int, dict[str, float]]]] = {}
    for (prompt, file, sample), levels in samples.items():
        means = {name: sum(row.scores[name] for row in levels) / len(levels) for name in levels[0].scores}
        by_prompt.setdefault(prompt, []).append((sum(means.values()), file, sample, means))
    return [
        Ranked(number, file, sample, prompt, total, means)
        for prompt, members in by_prompt.items()
        for number, (total, file, sample, means) in enumerate(sorted(members, key=lambda each: -each[0]), start=1)
    ]


def write_csv(ranked: Sequence[Ranked]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["rank", "file", "sample", "prompt", "total", *ranked[0].scores])
    for each in ranked:
        scores = [f"{score:.6g}" for score in each.scores.values()]
        writer.writerow([each.rank, each.file, each.sample, each.prompt, f"{each.total:.6g}", *scores])
    sys.stdout.flush()


def copy_best(ranked: Sequence[Ranked], folder: Path) -> None:
    """Copy files as ``01-name.mp4``, by prompt and rank, with their prompts beside them; nothing is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    files = dict.fromkeys((each.file, each.prompt) for each in ranked)
    digits = len(str(len(files)))
    for number, (file, prompt) in enumerate(files, start=1):
        source = Path(file)
        target = folder / f"{number:0{digits}d}-{source.name}"
        while target.exists():
            target = target.with_name(f"{target.stem}-again{target.suffix}")
        shutil.copyfile(source, target)
        with atomic_write(target.with_suffix(".txt")) as temporary:
            temporary.write_text(f"{prompt}\n", encoding="utf-8")
    messages.say(f"{len(files)} files copied to {printable(folder)}")


def write_ranking_page(path: Path, ranked: Sequence[Ranked], unit: str, clip: Mapping[str, Any]) -> None:
    """Write a page with the videos of each prompt beside each other, the best first."""
    parts = [f"<header><h1>Ranked by score</h1><p class=quiet>Of a score: {html_text(unit)}.</p></header>"]
    for prompt in dict.fromkeys(each.prompt for each in ranked):
        figures = ""
        for each in ranked:
            if each.prompt == prompt:
                figures += _figure(each, clip)
        parts.append(f"<section><h3>{html_text(prompt)}</h3><div class=grid>{figures}</div></section>")
    write_page(path, "Ranked by score", parts, "Written by prfl.")


def _figure(each: Ranked, clip: Mapping[str, Any]) -> str:
    source = Path(each.file)
    content = None
    if source.suffix != LATENTS:
        size = VideoSize(**clip)
        content = browser_mp4(read_video(source, size), size.fps)
    scores = ", ".join(f"{name} {score:+.2f}" for name, score in each.scores.items())
    sample = f" ({each.sample})" if each.sample else ""
    caption = f"{html_text(source.name)}{sample} <small>{each.total:+.2f}: {html_text(scores)}</small>"
    return video_figure(f"{each.rank}.", content, caption)
