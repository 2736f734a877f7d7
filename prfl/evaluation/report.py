"""One self-contained ``report.html`` for a run folder: nothing is loaded from anywhere, so it can be mailed.

It shows, as far as the run has them: results with intervals, before/after videos from the same noise, curves of
``metrics.jsonl``, the reward by noise level, the resolved config, the environment.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prfl.evaluation import plots
from prfl.evaluation.metrics import Interval
from prfl.evaluation.reward_eval import OVERALL, Level, Row, measured, read_rows
from prfl.evaluation.run_files import RunFiles
from prfl.evaluation.style import STYLE
from prfl.utils.files import atomic_write
from prfl.utils.text import html_text

# Curves that a person asks for first; the rest follow, folded away.
FIRST = ("judge/all", "measured", "reward", "held_out", "motion", "diversity", "loss", "gradient_norm", "distance")


def write_report(run: Path, title: str = "") -> Path:
    """Write ``run/report.html`` (atomically) and return its path.

    Reads config.yaml, environment.json, metrics.jsonl, samples/*/results.json (``final`` if there is one, else the
    last) and reward_eval*.json; what is missing is left out.
    """
    files, metrics = RunFiles(run), run / "metrics.jsonl"
    config, environment = run / "config.yaml", run / "environment.json"
    last = last_results(files, run)

    parts = [
        _head(run, title or run.name),
        files.section(last[0], lambda: _results(*last)) if last else "",
        files.section(last[0], lambda: _videos(files, *last)) if last else "",
        *(files.section(path, partial(_ranking, files, path)) for path in sorted(run.glob("reward_eval*.json"))),
        files.section(metrics, lambda: _curves(files.records(metrics))),
        files.section(config, lambda: _file("Config", config, files.text(config))),
        files.section(environment, lambda: _environment(files.json(environment))),
    ]
    return _finished(run / "report.html", title or run.name, parts, files)


def write_samples_page(results: Path, title: str) -> Path:
    """Write ``index.html`` beside a results.json: the scores, and every video with its prompt, side by side."""
    files = RunFiles(results.parent)
    content = files.json(results) or {}
    header = f"<header><h1>{html_text(title)}</h1></header>"
    parts = [header, _results(results, content), _videos(files, results, content, "Videos")]
    return _finished(results.with_name("index.html"), title, parts, files)


def _finished(path: Path, title: str, parts: Sequence[str], files: RunFiles) -> Path:
    """Write the page, with what it leaves out at its end and on the console."""
    items = "".join(f"<p>{html_text(line)}</p>" for line in files.left_out)
    files.tell()
    return write_page(path, title, [*parts, f"<section><h2>Left out</h2>{items}</section>" if items else ""])


FOOTER = "Written by prfl. Intervals are 95 % percentile bootstraps over prompts."


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


def last_results(files: RunFiles, run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read samples/final/results.json, or that of the last step: its path and content; a damaged one is passed over."""
    places = [run / "samples" / "final" / "results.json", *sorted(run.glob("samples/*/results.json"), reverse=True)]
    for path in dict.fromkeys(places):
        if results := files.json(path, "outcomes", "rows", "videos"):
            return path, results
    return None


# --- parts of the page ----------------------------------------------------------------------------------------------


def _head(run: Path, title: str) -> str:
    return f"<header><h1>{html_text(title)}</h1><p class=quiet>{html_text(str(run.resolve().name))}</p></header>"


def _results(path: Path, results: Mapping[str, Any]) -> str:
    """Show the table of scores: a column for each generator, and for its difference to the first one."""
    outcomes: dict[str, Any] = results["outcomes"]
    first, *others = outcomes

    head = f"<th>{html_text(first)}</th>"
    for name in others:
        head += f"<th>{html_text(name)}</th><th>{html_text(name)} − {html_text(first)}</th>"
    body = ""
    for key in outcomes[first]["summary"]:
        cells = ""
        for name, outcome in outcomes.items():
            cells += _cell(outcome["summary"].get(key))
            cells += _cell(outcome["difference"].get(key), signed=True) if name != first else ""
        body += f"<tr{' class=headline' if key == 'judge/all' else ''}><td>{html_text(key)}</td>{cells}</tr>"

    count = f"{results['samples']} samples of {results['prompts']} prompts ({path.parent.name})"
    same = "; differences are paired, from the same noise" if others else ""
    return (
        f"<section><h2>Results</h2>{_tiles(outcomes)}<p class=quiet>{html_text(count)}{same}.</p>"
        f"<div class=wide><table><thead><tr><th>score</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "</section>"
    )


def _tiles(outcomes: Mapping[str, Any]) -> str:
    """Show the headline score of each generator, large; nothing where no judge was given."""
    tiles = ""
    for name, outcome in outcomes.items():
        if "judge/all" in outcome["summary"]:
            value = Interval(**outcome["summary"]["judge/all"])
            interval = f"{value.low:.2f} to {value.high:.2f}"
            tiles += f"<div><b>{value.value:.3f}</b><span>{html_text(name)}</span><small>{interval}</small></div>"
    return f"<div class=tiles>{tiles}</div>" if tiles else ""


def _cell(fields: dict[str, float] | None, signed: bool = False) -> str:
    """Show an interval; signed: as a difference, marked where it is clear of 0."""
    if fields is None:
        return "<td>–</td>"
    interval = Interval(**fields)
    sign = "+" if signed else ""
    clear = " class=clear" if signed and interval.low * interval.high > 0 else ""
    text = f"{interval.value:{sign}.3f} <small>[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]</small>"
    return f"<td{clear}>{text}</td>"


def _videos(files: RunFiles, path: Path, results: Mapping[str, Any], heading: str = "Before and after") -> str:
    """Show the videos of each prompt side by side."""
    if not results["videos"]:
        return ""
    blocks = ""
    for entry in results["videos"]:
        row = results["rows"][entry["row"]]
        figures = ""
        for name, file in entry["files"].items():
            figures += video_figure(name, files.video(path.parent / file), verdict(row[name]))
        blocks += f"<article><h3>{html_text(row['prompt'])}</h3><div class=pair>{figures}</div></article>"
    note = "The first sample of the first prompts, not selected. Side by side: the same noise."
    return f"<section><h2>{heading}</h2><p class=quiet>{note}</p><div class=grid>{blocks}</div></section>"


def video_figure(name: str, content: bytes | None, caption: str) -> str:
    """Show one video, inside the page, under its name.  caption: HTML."""
    source = f' src="data:video/mp4;base64,{base64.b64encode(content or b"").decode()}"' if content else ""
    return (
        f"<figure><video{source} autoplay loop muted playsinline></video>"
        f"<figcaption><b>{html_text(name)}</b> {caption}</figcaption></figure>"
    )


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


def _ranking(files: RunFiles, path: Path) -> str:
    """Show how well the reward ranks, by noise level."""
    content = files.json(path, "rows")
    if not content or not content["rows"]:
        return ""

    facts, rows = read_rows(content)
    dimensions = list(dict.fromkeys(row.dimension for row in rows))
    dimensions.sort(key=lambda name: name != OVERALL)
    about = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float))

    # Accuracy is the headline; the other measures are folded away.
    accuracy, *others = measured(rows).values()
    more = ""
    for measure in others:
        plot = image(plots.by_sigma(rows, dimensions, measure), measure.title)
        more += _details(f"{measure.title}, by noise level", plot)

    return (
        f"<section><h2>How well the reward ranks</h2><p class=quiet>Pairwise accuracy within a prompt by noise "
        f"level; 0.5 is chance, sigma 1 the floor. {html_text(about)}</p>"
        + image(plots.by_sigma(rows, dimensions, accuracy), "pairwise accuracy against sigma")
        + more
        + _ranking_table([row for row in rows if row.level.kind != "sampler"], dimensions[0])
        + _calibration(rows, dimensions[0])
        + "</section>"
    )


def _calibration(rows: Sequence[Row], dimension: str, sigma: float = 0.8) -> str:
    level = Level("point", sigma, sigma)
    level_rows = [
        row for row in rows if (row.dimension, row.level) == (dimension, level) and row.reliability is not None
    ]
    if not level_rows:
        return ""
    plot = image(plots.reliability(level_rows), "predicted probability against the share of good samples")
    return _details(f"calibration at sigma {sigma} ({dimension})", plot)


def _details(title: str, content: str) -> str:
    return f"<details><summary>{html_text(title)}</summary>{content}</details>"


def _ranking_table(rows: Sequence[Row], dimension: str) -> str:
    """Show a table for each measure: one line a noise level, one column a scorer."""
    rows = [row for row in rows if row.dimension == dimension]
    tables = ""
    for measure in measured(rows).values():
        scorers = list(dict.fromkeys(row.scorer for row in rows))
        values = {(row.scorer, row.level): measure.read(row) for row in rows}

        head = "".join(f"<th>{html_text(scorer)}</th>" for scorer in scorers)
        body = ""
        for level in dict.fromkeys(row.level for row in rows):
            cells = ""
            for scorer in scorers:
                value = values.get((scorer, level))
                cells += _cell(None if value is None else vars(value))
            body += f"<tr><td>{html_text(level.label)}</td>{cells}</tr>"

        table = f"<table><thead><tr><th>sigma</th>{head}</tr></thead><tbody>{body}</tbody></table>"
        tables += _details(f"{measure.title} ({dimension})", f"<div class=wide>{table}</div>")
    return tables


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Show the metrics over steps, those of ``FIRST`` unfolded."""
    names = list(dict.fromkeys(name for record in records for name in record if name != "step"))
    first = [name for name in names if name.startswith(FIRST)]
    rest = [name for name in names if name not in first]
    if not names:
        return ""

    shown = first or rest
    text = "<section><h2>Curves</h2>" + image(plots.curves(records, shown), "metrics over training steps")
    if first and rest:
        more = image(plots.curves(records, rest), "more metrics over training steps")
        text += f"<details><summary>{len(rest)} more</summary>{more}</details>"
    return text + "</section>"


def image(data: bytes, alt: str) -> str:
    return f'<img alt="{html_text(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _file(heading: str, path: Path, text: str | None) -> str:
    if text is None:
        return ""
    return (
        f"<section><h2>{heading}</h2><details><summary>{path.name}</summary>"
        f"<pre>{html_text(text)}</pre></details></section>"
    )


def _environment(facts: Mapping[str, Any] | None) -> str:
    if not facts:
        return ""
    rows = "".join(f"<tr><td>{html_text(str(k))}</td><td>{html_text(str(v))}</td></tr>" for k, v in facts.items())
    table = f"<details><summary>versions and device</summary><table>{rows}</table></details>"
    return f"<section><h2>Environment</h2>{table}</section>"
