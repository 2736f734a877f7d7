"""Videos on a page: base and policy side by side, and one prompt over the steps of a run."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from prfl.evaluation.page.compared import Results, Round
from prfl.evaluation.page.html import quiet, scrolled, section
from prfl.evaluation.run_files import VIDEO, RunFiles
from prfl.utils.text import html_text

LONGEST_STRIP = 6  # rounds that a strip shows


def videos_section(files: RunFiles, page: Path, results: Results, heading: str) -> str:
    """Show the videos of each prompt side by side.  page: the folder of the page, from which the mp4s are linked."""
    blocks = ""
    for entry in results.content["videos"]:
        row = results.content["rows"][entry["row"]]
        figures = "".join(
            _video(files, page, results.folder / file, name, row[name]) for name, file in entry["files"].items()
        )
        blocks += f"<article><h3>{html_text(row['prompt'])}</h3><div class=pair>{figures}</div></article>"
    if not blocks:
        return ""
    together = " Side by side: the same noise." if len(results.names) > 1 else ""
    drawn = f" {results.drawn[0].upper()}{results.drawn[1:]}." if results.drawn else ""
    note = f"The first sample of the first prompts, not selected.{together}{drawn}"
    return section(heading, quiet(note), f"<div class=grid>{blocks}</div>")


def strips_section(files: RunFiles, page: Path, rounds: Sequence[Round], kept: int | None) -> str:
    """Show one sample of each validation prompt over the rounds of a run, always from the same noise.

    Videos too large for a page are not in it: it plays them from the run's folder.
    """
    shown = spread(rounds, kept)
    if len(shown) < 2:
        return ""
    strips = {number: _strip(shown, number) for number in range(len(shown[0].results.content["videos"]))}
    inside = files.small([path for frames in strips.values() for _, path, _ in frames])
    blocks = ""
    for number, frames in strips.items():
        entry = shown[0].results.content["videos"][number]
        prompt = str(shown[0].results.content["rows"][entry["row"]]["prompt"])
        figures = "".join(
            _video(files, page, path, step_name(step, kept), scores, inside) for step, path, scores in frames
        )
        strip = scrolled(figures, f"{prompt}, over the steps", "strip")
        blocks += f"<article><h3>{html_text(prompt)}</h3>{strip}</article>"
    note = "One sample of each validation prompt at several steps, always from the same noise. Step 0 is the base."
    outside = " The videos are large and not inside the page: it plays them from the run's folder, beside it."
    return section("Over the steps", quiet(note + ("" if inside else outside)), blocks)


def _strip(rounds: Sequence[Round], number: int) -> list[tuple[int, Path, Mapping[str, float]]]:
    """List one prompt's videos: the step, the file and the scores of each round that kept it."""
    frames = []
    for each in rounds:
        content = each.results.content
        if number < len(content["videos"]):
            entry = content["videos"][number]
            path = each.results.folder / entry["files"]["policy"]
            frames.append((each.step, path, content["rows"][entry["row"]]["policy"]))
    return frames


def spread(rounds: Sequence[Round], kept: int | None) -> list[Round]:
    """Choose rounds for a strip: the first, the last, the one that is kept, and some between, evenly."""
    count = min(LONGEST_STRIP, len(rounds))
    evenly = {round(i * (len(rounds) - 1) / max(1, count - 1)) for i in range(count)}
    return [each for i, each in enumerate(rounds) if i in evenly or each.step == kept]


def step_name(step: int, kept: int | None) -> str:
    return f"step {step}" + (" (base)" if step == 0 else "") + (" (kept)" if step == kept else "")


def _video(files: RunFiles, page: Path, path: Path, name: str, scores: Mapping[str, float], inside: bool = True) -> str:
    """Show one video with its scores and a link to its file; one that may not be shown has neither.

    inside: the video is part of the page, else it is played from its file.
    """
    content = files.video(path) if inside else None
    there = content is not None if inside else files.is_video(path) and files.resolve(path, VIDEO) is not None
    address = link_to(path, page)
    link = f' <a href="{address}">mp4</a>' if there else ""
    return video_figure(name, content, verdict(scores) + link, "" if inside or not there else address)


def video_figure(name: str, content: bytes | None, caption: str, address: str = "") -> str:
    """Show one video under its name: inside the page, or, without content, from its address.  caption: HTML."""
    source = f"data:video/mp4;base64,{base64.b64encode(content).decode()}" if content else address
    played = f' src="{source}"' if source else ""
    label = html_text(f"video: {name}")
    return (
        f'<figure><video{played} aria-label="{label}" autoplay loop muted playsinline></video>'
        f"<figcaption><b>{html_text(name)}</b> {caption}</figcaption></figure>"
    )


def link_to(path: Path, page: Path) -> str:
    """Write the address of a file as seen from the page's folder."""
    return html_text(quote(Path(os.path.relpath(path, page)).as_posix()))


def verdict(scores: Mapping[str, float]) -> str:
    """Show what the judge found wrong, or its scores where they are not yes or no; then the reward.  Returns HTML."""
    judged = {key.removeprefix("judge/"): value for key, value in scores.items() if key.startswith("judge/")}
    if judged and set(judged.values()) <= {0.0, 1.0}:
        wrong = [key for key, value in judged.items() if value == 0 and key != "all"]
        good = judged.get("all", float(not wrong)) == 1
        text = "<i class=good>right</i> " if good else f"<i class=bad>wrong: {html_text(', '.join(wrong))}</i> "
    else:
        text = "".join(f"{html_text(key)} {value:.2f} " for key, value in judged.items())
    return text + (f"<small>reward {scores['reward/total']:+.2f}</small>" if "reward/total" in scores else "")
