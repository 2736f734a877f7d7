"""A page of steered videos: the chosen one beside rejected ones, their scores along sigma, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prfl.evaluation.page.videos import verdict, video_figure
from prfl.evaluation.report import write_page
from prfl.evaluation.run_files import RunFiles
from prfl.utils.text import html_text, of_experts

WIDTH, HEIGHT, EDGE = 460, 120, 24  # of a plot, and of its edges

FOOTER = (
    "Written by prfl. A network call is one forward pass of the video model for one sample. The last decode of what "
    "was kept is not counted, nor are those of rejected chains for this page."
)


def write_steering_page(results: Path, title: str) -> Path:
    """Write ``index.html`` beside the results.json of steered videos; what cannot be read is said and left out."""
    files = RunFiles(results.parent)
    content = files.json(results, "videos", "sigmas") or {"videos": [], "sigmas": []}
    parts = [f"<header><h1>{html_text(title)}</h1></header>", _cost(content) if content["videos"] else ""]
    parts += [_video(files, results.parent, record, content["sigmas"]) for record in content["videos"]]
    files.tell()
    return write_page(results.with_name("index.html"), title, parts, FOOTER)


def _cost(content: Mapping[str, Any]) -> str:
    """Calls spent and saved, and how many of the chosen are right where a judge says so."""
    calls, whole = content["calls"], content["whole"]
    spent, full = sum(calls.values()), sum(whole.values())
    tiles = f"<div><b>{spent:.0f}</b><span>network calls a video</span><small>{_parts(calls)}</small></div>"
    saved = full - spent
    chains = content["steering"]["chains"]
    against = f"against {chains} whole chains, compared at the end ({full:.0f})"
    word = "saved" if saved >= 0 else "more"
    tiles += f"<div><b>{abs(saved):.0f}</b><span>{word}</span><small>{against}</small></div>"
    chosen = [record["kept"][0]["scores"] for record in content["videos"]]
    if all("judge/all" in scores for scores in chosen):
        right = sum(scores["judge/all"] for scores in chosen)
        tiles += f"<div><b>{right:.0f} of {len(chosen)}</b><span>right</span><small>says the judge</small></div>"
    guided = f", guidance {of_experts(content['guidance_scale'])}" if content["guidance_scale"] != 1 else ""
    facts = (
        f"{content['method']} of {chains} chains, {content['generator']}, {len(content['sigmas']) - 1} steps{guided}"
    )
    return f"<section><div class=tiles>{tiles}</div><p class=quiet>{html_text(facts)}</p></section>"


def _parts(calls: Mapping[str, float]) -> str:
    words = {"policy": "steps", "reward": "reading rewards", "decodes": "decoding"}
    return ", ".join(f"{calls[key]:.1f} {word}" for key, word in words.items() if calls[key])


def _video(files: RunFiles, folder: Path, record: Mapping[str, Any], sigmas: Sequence[float]) -> str:
    figures = ""
    for chain in record["kept"]:
        figures += _figure(files, folder, "chosen", chain)
    for chain in record["rejected"]:
        if "file" in chain:
            sigma = sigmas[chain["node"]]
            end = "at the end" if sigma == 0 else f"at sigma {sigma:.2f}, as predicted there"
            figures += _figure(files, folder, f"rejected {end}", chain)
    return (
        f"<section><h3>{html_text(record['prompt'])}</h3><div class=pair>{figures}</div>"
        f"{traces(record, sigmas)}</section>"
    )


def _figure(files: RunFiles, folder: Path, name: str, chain: Mapping[str, Any]) -> str:
    score = f"<small>score {chain['trace'][-1][1]:+.2f}</small>" if chain["trace"] else ""
    return video_figure(name, files.video(folder / chain["file"]), verdict(chain["scores"]) + score)


def traces(record: Mapping[str, Any], sigmas: Sequence[float]) -> str:
    """Every chain's scores along sigma, from noise on the left: an svg, the chosen ones in colour."""
    chains = [(chain["trace"], False) for chain in record["rejected"]] + [(c["trace"], True) for c in record["kept"]]
    values = [score for trace, _ in chains for _, score in trace]
    if not values:
        return ""
    low, high = min(values), max(values)
    room = (high - low) or 1.0

    def at(node: int, score: float) -> tuple[float, float]:
        across = EDGE + (1 - sigmas[node]) * (WIDTH - 2 * EDGE)
        return across, HEIGHT - EDGE - (score - low) / room * (HEIGHT - 2 * EDGE)

    marks = ""
    for trace, chosen in chains:
        points = [at(node, score) for node, score in trace]
        colour = "var(--accent)" if chosen else "var(--quiet)"
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks += f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{2 if chosen else 1}"/>'
        marks += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if chosen else 2.5}" fill="{colour}"/>' for x, y in points
        )
    nodes = sorted({node for trace, _ in chains for node, _ in trace})
    for node in (nodes[0], nodes[-1]) if len(nodes) > 1 else nodes:
        x, _ = at(node, low)
        marks += f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="middle">sigma {sigmas[node]:.2f}</text>'
    for score in dict.fromkeys((high, low)):
        _, y = at(0, score)
        marks += f'<text x="0" y="{y + 4:.1f}">{score:+.2f}</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:100%;max-width:{WIDTH}px;font-size:11px" '
        f'fill="currentColor" role="img"><title>scores along sigma</title>{marks}</svg>'
    )
