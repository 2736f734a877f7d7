"""Results as rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from prfl.evaluation.metrics import Interval
from prfl.evaluation.policy_eval import Outcome, compare, summarise
from prfl.evaluation.reward_eval import Measure, Row

LEVEL_KINDS = {"bin": "bins", "point": "points", "sampler": "the sampler's own"}


def ranking_tables(rows: Sequence[Row], measure: Measure) -> dict[str, Table]:
    """Make one table of a measure: a line a noise level, a column a dimension, the numbers of pairs at its end.

    Several scorers are compared side by side, a table for each dimension.  Returns tables by what is to stand above.
    """
    rows = [row for row in rows if measure.read(row)]
    scorers = list(dict.fromkeys(row.scorer for row in rows))
    dimensions = list(dict.fromkeys(row.dimension for row in rows))
    if len(scorers) == 1:
        columns = {dimension: [row for row in rows if row.dimension == dimension] for dimension in dimensions}
        return {_explained(measure.title, measure): _ranking_table(columns, measure)}
    tables = {}
    for dimension in dimensions:
        of_dimension = [row for row in rows if row.dimension == dimension]
        columns = {scorer: [row for row in of_dimension if row.scorer == scorer] for scorer in scorers}
        columns = {name: column for name, column in columns.items() if column}
        tables[_explained(f"{dimension}: {measure.title}", measure)] = _ranking_table(columns, measure)
    return tables


def _explained(title: str, measure: Measure) -> str:
    """Say what a table shows, in the lines above it: a title of its own would be broken to its width."""
    explained = f"{title}, by noise level (sigma: 0 clean, 1 noise)\n±: half of the 95 % interval over prompts."
    if measure.ignorant is not None:
        explained += f" {measure.ignorant:g} is chance; pale: the interval reaches it."
    return explained


def _ranking_table(columns: Mapping[str, Sequence[Row]], measure: Measure) -> Table:
    """Make a table of columns by name.  What a scorer that knows nothing may have is pale."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("sigma")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")

    cells = {name: {row.level: _cell(measure.read(row), measure) for row in rows} for name, rows in columns.items()}
    levels = list(dict.fromkeys(row.level for rows in columns.values() for row in rows))
    for kind, title_of_kind in LEVEL_KINDS.items():
        of_kind = [level for level in levels if level.kind == kind]
        if of_kind and len({level.kind for level in levels}) > 1:
            table.add_section()
            table.add_row(title_of_kind, style="dim")
        for level in of_kind:
            table.add_row(level.label, *(by_level.get(level, "-") for by_level in cells.values()))
    table.add_section()
    table.add_row("pairs", *(str(max(row.pairs for row in rows)) for rows in columns.values()))
    return table


def _cell(interval: Interval | None, measure: Measure) -> Text:
    if interval is None:
        return Text("-")
    half = (interval.high - interval.low) / 2
    pale = measure.ignorant is not None and interval.low <= measure.ignorant
    return Text(f"{interval.value:.2f} ±{half:.2f}", style="dim" if pale else "")


def policy_table(outcomes: Sequence[Outcome]) -> Table:
    """Make a table with one line a score; a column for each generator and for its difference to the first one."""
    summaries = {outcome.name: summarise(outcome) for outcome in outcomes}
    changes = {outcome.name: compare(outcome, outcomes[0]) for outcome in outcomes[1:]}
    return comparison_table(summaries, changes)


def comparison_table(
    summaries: Mapping[str, Mapping[str, Interval]], changes: Mapping[str, Mapping[str, Interval]]
) -> Table:
    """Make a table with one line a score of the first summary, and its differences to the others."""
    first = next(iter(summaries))
    table = Table("score", title="means with 95 % intervals over prompts", title_justify="left")
    for name in summaries:
        table.add_column(name, justify="right", no_wrap=True)
        if name in changes:
            table.add_column(f"{name} - {first}", justify="right", no_wrap=True)

    for key in summaries[first]:
        cells = []
        for name, summary in summaries.items():
            cells.append(str(summary.get(key, "-")))
            if name in changes:
                cells.append(str(changes[name].get(key, "-")))
        table.add_row(key, *cells)
    return table
