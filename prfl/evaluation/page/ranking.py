"""How well a reward ranks, by noise level: a verdict, a plot for each dimension, one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl.evaluation import plots
from prfl.evaluation.page.html import cell, details, plot, quiet, section, table
from prfl.evaluation.reward_eval import OVERALL, Level, Measure, Row, measured, measured_card, read_rows
from prfl.evaluation.run_files import RunFiles
from prfl.reward.checkpoint_schema import RewardCard
from prfl.reward.ranking_accuracy import advice, doubts
from prfl.utils.text import html_text

EXPLAINED = (
    "Pairwise accuracy: the share of pairs of videos of one prompt that the reward orders as the held-out labels do; "
    "0.5 is chance. Sigma is the noise level at which it sees them: 0 the clean video, 1 pure noise, where nothing can "
    "be seen. Bands and brackets: 95 % intervals over prompts."
)


def ranking_section(files: RunFiles, path: Path) -> str:
    """Show the content of a reward_eval.json."""
    content = files.json(path, "rows")
    if not content or not content["rows"]:
        return ""
    facts, rows = read_rows(content)
    dimensions = sorted(dict.fromkeys(row.dimension for row in rows), key=lambda name: name != OVERALL)
    about = ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float))

    # Accuracy is the headline; the other measures are folded away.
    accuracy, *others = measured(rows).values()
    more = ""
    for measure in others:
        shown = _plots(rows, dimensions, measure) + _table(rows, dimensions, measure)
        more += details(f"{measure.title}, by noise level", shown)
    return section(
        "How well the reward ranks",
        _verdict(rows),
        quiet(EXPLAINED),
        quiet(about) if about else "",
        _plots(rows, dimensions, accuracy),
        _table(rows, dimensions, accuracy),
        more,
        _calibration(rows, dimensions[0]),
    )


def _verdict(rows: Sequence[Row]) -> str:
    """Say of each scorer which dimensions are worth following, and which are not."""
    scorers = list(dict.fromkeys(row.scorer for row in rows))
    lines = ""
    for scorer in scorers:
        card = RewardCard(**measured_card(rows, scorer))
        dimensions = [name for name in card.accuracy if name != OVERALL] or list(card.accuracy)
        if dimensions:
            named = f"{scorer}: " if len(scorers) > 1 else ""
            lines += f"<p class=verdict>{html_text(named + advice(card, dict.fromkeys(dimensions, 1.0)))}</p>"
            lines += "".join(quiet(f"{named}{doubt}.") for doubt in doubts(card, dimensions))
    return lines


def _plots(rows: Sequence[Row], dimensions: Sequence[str], measure: Measure) -> str:
    figures = ""
    for dimension in dimensions:
        of_dimension = [row for row in rows if row.dimension == dimension and measure.read(row)]
        if of_dimension:
            meaning = "every label good" if dimension == OVERALL else ""
            figures += plot(plots.by_sigma(of_dimension, [dimension], measure), dimension, meaning)
    return f"<div class=plots>{figures}</div>"


def _table(rows: Sequence[Row], dimensions: Sequence[str], measure: Measure) -> str:
    """Make a table with a line for each noise level, a column for each dimension (and scorer), and the pairs."""
    rows = [row for row in rows if row.level.kind != "sampler"]
    several = len({row.scorer for row in rows}) > 1
    columns: dict[str, dict[Level, Row]] = {}
    for dimension in dimensions:
        for row in rows:
            if row.dimension == dimension:
                name = f"{dimension}, {row.scorer}" if several else dimension
                columns.setdefault(name, {})[row.level] = row

    body = []
    for level in dict.fromkeys(row.level for row in rows):
        body.append([html_text(level.label), *(_value(column.get(level), measure) for column in columns.values())])
    pairs = [f"<td>{max(row.pairs for row in column.values())}</td>" for column in columns.values()]
    return table(["sigma", *columns], [*body, ["pairs", *pairs]], measure.title)


def _value(row: Row | None, measure: Measure) -> str:
    value = measure.read(row) if row else None
    return cell(None if value is None else vars(value))


def _calibration(rows: Sequence[Row], dimension: str, sigma: float = 0.8) -> str:
    level = Level("point", sigma, sigma)
    rows = [row for row in rows if (row.dimension, row.level) == (dimension, level) and row.reliability is not None]
    if not rows:
        return ""
    title = f"calibration at sigma {sigma} ({dimension})"
    meaning = "predicted probability of a good label against the share of good ones; on the dotted line both agree"
    return details(title, f"<div class=plots>{plot(plots.reliability(rows), title, meaning)}</div>")
