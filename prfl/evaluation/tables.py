"""Results as rich tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from prfl.evaluation.metrics import Interval
from prfl.evaluation.policy_eval import Outcome, compare, summarise
from prfl.evaluation.reward_eval import Measure, Row


def reward_table(rows: Sequence[Row], dimension: str, measure: Measure, title: str = "") -> Table:
    """Make a table with one line a noise level, one column a scorer."""
    rows = [row for row in rows if row.dimension == dimension]
    scorers = list(dict.fromkeys(row.scorer for row in rows))
    table = Table(title=f"{title + ': ' if title else ''}{measure.title} ({dimension})", title_justify="left")
    table.add_column("sigma")
    for scorer in scorers:
        table.add_column(scorer, justify="right", no_wrap=True)

    values = {(row.scorer, row.level): measure.read(row) for row in rows}
    kind = None
    for level in dict.fromkeys(row.level for row in rows):
        if level.kind != kind:
            kind = level.kind
            table.add_section()
            table.add_row({"bin": "bins", "point": "points", "sampler": "the sampler's own"}[kind], style="dim")
        table.add_row(level.label, *(str(values.get((scorer, level)) or "-") for scorer in scorers))
    return table


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
