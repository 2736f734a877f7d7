"""One self-contained ``report.html`` for a run folder: nothing is loaded from anywhere, so it can be mailed.

It shows, as far as the run has them: a verdict and results with intervals, before/after videos from the same noise, a
strip of videos over the steps, curves of ``metrics.jsonl``, the reward by noise level, the resolved config, the
environment.  Its sections are in ``page/``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prfl.evaluation.page.compared import (
    KEYS,
    Results,
    Round,
    before_and_after,
    final_results,
    kept_step,
    rounds_of,
    sampled_results,
)
from prfl.evaluation.page.curves import curves_section
from prfl.evaluation.page.html import details, scrolled, section
from prfl.evaluation.page.ranking import ranking_section
from prfl.evaluation.page.results import results_section
from prfl.evaluation.page.videos import strips_section, videos_section
from prfl.evaluation.run_files import RunFiles
from prfl.evaluation.style import STYLE
from prfl.utils.files import atomic_write
from prfl.utils.text import html_text

FOOTER = "Written by prfl. Intervals are 95 % percentile bootstraps over prompts."


def write_report(run: Path, title: str = "") -> Path:
    """Write ``run/report.html`` (atomically) and return its path.

    Reads config.yaml, environment.json, metrics.jsonl, samples/*/results.json and reward_eval*.json; what is missing is
    left out.  Before and after are those of samples/final, else of the rounds on validation prompts.
    """
    files, metrics, samples = RunFiles(run), run / "metrics.jsonl", run / "samples"
    config, environment = run / "config.yaml", run / "environment.json"
    nothing: list[dict[str, Any]] = []
    no_rounds: list[Round] = []
    no_results: dict[str, Results] = {}
    records = files.attempt(metrics, lambda: files.records(metrics), nothing)
    kept = kept_step(records)
    rounds = files.attempt(samples, lambda: rounds_of(files, run), no_rounds)
    results_by_heading = files.attempt(samples, lambda: results_of(files, run, rounds, kept), no_results)
    rankings = sorted(run.glob("reward_eval*.json"))

    parts = [_head(run, title or run.name)]
    for heading, results in results_by_heading.items():
        parts.append(files.section(results.folder, partial(results_section, results, heading)))
        videos = "Before and after" if len(results.names) > 1 else "Videos"
        parts.append(files.section(results.folder, partial(videos_section, files, run, results, videos)))
    parts += [
        files.section(samples, lambda: strips_section(files, run, rounds, kept)),
        *(files.section(path, partial(ranking_section, files, path)) for path in rankings),
        files.section(metrics, lambda: curves_section(records)),
        files.section(config, lambda: _file("Config", config, files.text(config))),
        files.section(environment, lambda: _environment(files.json(environment))),
    ]
    return _finished(run / "report.html", title or run.name, parts, files)


def results_of(files: RunFiles, run: Path, rounds: Sequence[Round], kept: int | None) -> dict[str, Results]:
    """Choose the results to show, by heading: those of the end, the rounds' where these lack a base, else samples."""
    final = final_results(files, run)
    if final and len(final.names) > 1:
        return {"Results": final}
    of_rounds = before_and_after(rounds, kept)
    if final and of_rounds:
        return {"Results": final, "Results on validation prompts": of_rounds}
    results = final or of_rounds or sampled_results(files, run)
    return {"Results": results} if results else {}


def write_samples_page(results: Path, title: str) -> Path:
    """Write ``index.html`` beside a results.json: the scores, and every video with its prompt, side by side."""
    files = RunFiles(results.parent)
    parts = [f"<header><h1>{html_text(title)}</h1></header>"]
    if content := files.json(results, *KEYS):
        sampled = Results(results.parent, content)
        parts += [results_section(sampled, "Results"), videos_section(files, results.parent, sampled, "Videos")]
    return _finished(results.with_name("index.html"), title, parts, files)


def _finished(path: Path, title: str, parts: Sequence[str], files: RunFiles) -> Path:
    """Write the page, with what it leaves out at its end and on the console."""
    lines = "".join(f"<p>{html_text(line)}</p>" for line in files.left_out)
    files.tell()
    return write_page(path, title, [*parts, section("Left out", lines) if lines else ""])


def write_page(path: Path, title: str, parts: Sequence[str], footer: str = FOOTER) -> Path:
    """Write a self-contained page of these sections (HTML), atomically."""
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(filter(None, parts)) + "\n"
        f"<footer>{html_text(footer)}</footer>"
        "</main></body></html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


# --- parts of the page ------------------------------------------------------------------------------------------------


def _head(run: Path, title: str) -> str:
    name = run.resolve().name
    below = f"<p class=quiet>{html_text(name)}</p>" if name != title else ""
    return f"<header><h1>{html_text(title)}</h1>{below}</header>"


def _file(heading: str, path: Path, text: str | None) -> str:
    if text is None:
        return ""
    return section(heading, details(path.name, scrolled(f"<pre>{html_text(text)}</pre>", path.name)))


def _environment(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{html_text(str(k))}</th><td>{html_text(str(v))}</td></tr>" for k, v in facts.items()
    )
    return section("Environment", details("versions and device", scrolled(f"<table>{rows}</table>", "environment")))
