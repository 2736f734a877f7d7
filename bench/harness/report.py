"""Tables and a page of benchmark results, and what two of them differ in.

One line a provider, one table a case; the headline is how many times as fast as the reference, with its interval.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases.scale import by_world, curves
from bench.harness import scale_report, study_tables
from bench.harness.results import Row, by_case, time_ratio_apart
from bench.harness.scale_report import figures as _figures
from bench.harness.study_tables import fitting
from prfl.evaluation.metrics import Interval

PARTS = ("rollout", "reward", "decode", "backward", "optimizer")  # of a training step
PART_HEADS = tuple(f"{part} ms" for part in PARTS)
PER_GRADIENT = "ms/gradient"
HEAD = (
    "provider", "times as fast", "ms (20 to 80 %)", "rounds", "steps/s", PER_GRADIENT, "evaluations", "TFLOP",
    "of the network", "TFLOPS", "GB/s", "of roofline", "peak MiB", "total MiB", "saved MiB", "error", *PART_HEADS,
)  # fmt: skip
DASH = "-"
EVALUATIONS = "network evaluations"
GRADIENTS = "solver steps with gradient"  # of one optimizer step
TFLOP, SHARE = "TFLOP", "share of the network"  # of a run; of a network's arithmetic, where it was shortened
FIRST = ("same_step", "methods", "rival_prfl", "rival_vader")  # on a page: what all the others are about


def cells(row: Row) -> list[str]:
    """Write one line of a table: text under ``HEAD``."""
    info = row.info
    milliseconds, parts, memory = info["milliseconds"], info.get("parts_ms", {}), info["memory"]
    of_run = info.get("facts", {})
    evaluations, gradients, arithmetic, share = (of_run.get(name) for name in (EVALUATIONS, GRADIENTS, TFLOP, SHARE))
    total = memory.get("total") if info["device"] != "cpu" else None  # a CPU's has Python's own in it
    return [
        row.provider,
        f"{Interval(**info['times_reference'])}" if row.provider != info["reference"] else "1",
        f"{_figures(milliseconds['median'])} ({_figures(milliseconds['low'])} to {_figures(milliseconds['high'])})",
        f"{len(info['rounds_ms'])}",
        _or_dash(1e3 / milliseconds["median"] if "shapes" in info and "chain" in info["shapes"] else None, _figures),
        _or_dash(milliseconds["median"] / gradients if gradients else None, _figures),
        _or_dash(evaluations, _figures),
        _or_dash(arithmetic, _figures),
        _or_dash(share, _percent),
        _or_dash(info["tflops"], _figures),
        _or_dash(info["gb_per_s"], _figures),
        _or_dash(info["roofline"], _percent),
        _or_dash(memory.get("peak"), _mebibytes),
        _or_dash(total, _mebibytes),
        _or_dash(info["saved_bytes"], _mebibytes),
        _or_dash(info["error"], lambda error: f"{error:.1e}"),
        *(_or_dash(parts.get(part) or None, _figures) for part in PARTS),
    ]


def _or_dash(value: Any, write: Any) -> str:
    return DASH if value is None else write(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _mebibytes(size: int) -> str:
    return _figures(size / 2**20)


def used(rows: Sequence[Row]) -> list[int]:
    """Return the numbers of the columns that some row fills."""
    lines = [cells(row) for row in rows]
    several = any(row.info.get("facts", {}).get(GRADIENTS, 1) > 1 for row in rows)  # else they are the steps
    filled = [i for i in range(len(HEAD)) if any(line[i] != DASH for line in lines)]
    return [i for i in filled if HEAD[i] != PER_GRADIENT or several]


def about(rows: Sequence[Row]) -> list[str]:
    """Say what the rows were measured on and of, one line for each difference."""
    return list(dict.fromkeys(", ".join(_facts(row.info)) for row in rows))


def notes(rows: Sequence[Row]) -> list[str]:
    """Return the lines below the tables."""
    return [*([scale_report.NOTE] if curves(rows) else []), *lacking(rows), *about(rows)]


def lacking(rows: Sequence[Row]) -> list[str]:
    """Say what could not be measured, and why."""
    return [
        f"{row.case}, {row.provider}: no {what}: {reason}"
        for row in rows
        for what, reason in row.info.get("lacks", {}).items()
    ]


def _facts(info: Mapping[str, Any]) -> list[str]:
    versions = " ".join(f"{name} {number}" for name, number in info["versions"].items())
    threads = [f"{info['threads']} thread{'s' if info['threads'] > 1 else ''}"] if info["device"] == "cpu" else []
    sdpa = [f"SDPA by {info['sdpa']['video']}"] if info["device"] != "cpu" and "sdpa" in info else []  # older have none
    return [info["machine"], *threads, versions, *sdpa, f"commit {info['commit']}", f"weights: {info['weights']}"]


def title(row: Row) -> str:
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in row.info["shapes"].items())
    return f"{row.case} ({row.info['dtype']}; {shapes})"


# --------------------------------------------------------------------------------------------- terminal, markdown, page


def tables(rows: Sequence[Row], width: int) -> list[Table]:
    """Make one table a case, or as many as its columns need in this width."""
    all_tables = []
    rows, of_curves = apart(rows)
    for rows_of_case in by_case(rows).values():
        columns = used(rows_of_case)
        lines = [[line[i] for i in columns] for line in map(cells, rows_of_case)]
        all_tables += folded(title(rows_of_case[0]), [HEAD[i] for i in columns], lines, width)
    for name, lines in scale_report.tables(of_curves).items():
        all_tables += folded(name, scale_report.HEAD, lines, width)
    return all_tables


def folded(name: str, head: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[Table]:
    """Fold a table into ones of this width, each with the first column, so that none is cropped.

    A step's parts stay together.
    """
    widths = [3 + max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    parts = [i for i in range(len(head)) if head[i] in PART_HEADS]
    groups = fitting(len(head), lambda columns: 1 + sum(widths[i] for i in columns) <= width, parts)

    folds = []
    for number, columns in enumerate(groups):
        table = Table(title=name if number == 0 else None, title_justify="left")
        for i in columns:
            table.add_column(head[i], justify="left" if i == 0 else "right", overflow="fold")
        for line in lines:
            table.add_row(*(line[i] for i in columns))
        folds.append(table)
    return folds


def apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split the rows into those that are compared case by case, and those of a curve."""
    of_curves = [row for curve in curves(rows) for row in curve.rows]
    return [row for row in rows if row not in of_curves], of_curves


def terminal(rows: Sequence[Row], width: int = 220) -> str:
    """Write the tables as text, and what they were measured on."""
    target = io.StringIO()
    console = Console(file=target, width=width)
    for table in tables(rows, width):
        console.print(table)
    for line in notes(rows):
        console.print(line, markup=False, soft_wrap=True)
    return target.getvalue()


def markdown(rows: Sequence[Row]) -> str:
    """Write the tables of a page, one a case; rows of scale have their own."""
    compared, of_curves = apart(rows)
    texts = []
    for case, rows_of_case in by_case(compared).items():
        columns = used(rows_of_case)
        body = [[line[i] for i in columns] for line in map(cells, rows_of_case)]
        texts.append(f"{case}:\n\n{study_tables.markdown([HEAD[i] for i in columns], body)}")
    for name, lines in scale_report.tables(of_curves).items():
        texts.append(f"{name}:\n\n{study_tables.markdown(scale_report.HEAD, lines)}")
    return "\n".join([*texts, *notes(rows)]) + "\n"


def write_page(rows: Sequence[Row], path: Path) -> Path:
    """Write a self-contained page: facts, a plot of the headline, a table for each case."""
    from bench.harness.plots import scale
    from prfl.evaluation.page.html import image, scrolled
    from prfl.evaluation.report import write_page

    facts = "".join(f"<p class=quiet>{escape(line)}</p>" for line in notes(rows))
    parts = [f"<header><h1>Benchmarks</h1>{facts}</header>"]
    operations: dict[str, list[Row]] = {}
    compared, of_curves = apart(rows)
    for row in compared:
        operations.setdefault(row.info["operation"], []).append(row)
    for operation, rows_of_operation in sorted(operations.items(), key=lambda item: (*FIRST, item[0]).index(item[0])):
        body = "".join(_case(rows_of_case) for rows_of_case in by_case(rows_of_operation).values())
        parts.append(f"<section><h2>{escape(operation)}</h2>{body}</section>")
    if groups := scale_report.tables(of_curves):
        pictures = [image(scale(curves_of_world), "cost against size") for curves_of_world in by_world(of_curves)]
        plots = "".join(scrolled(picture, "cost against size", "picture") for picture in pictures)
        body = "".join(f"<h3>{escape(name)}</h3>{_lines(scale_report.HEAD, lines)}" for name, lines in groups.items())
        parts.append(f"<section><h2>cost against size</h2>{plots}{body}</section>")
    note = "Written by prfl. Intervals are 95 % percentile bootstraps over rounds."
    return write_page(path, "Benchmarks", parts, note)


def _case(rows: Sequence[Row]) -> str:
    """Show one case: a plot of the times, one of the memory, and the table."""
    from bench.harness.plots import memory, ratios
    from prfl.evaluation.page.html import plot

    plots = ""
    if len(rows) > 1:
        plots = plot(ratios(rows), "time", "more is faster; lines are 95 % intervals over rounds")
    if bars := memory(rows):
        plots += plot(bars, "memory", "peak above what was there before; what autograd keeps for the backward pass")
    columns = used(rows)
    body = [[line[i] for i in columns] for line in map(cells, rows)]
    table = _lines([HEAD[i] for i in columns], body)
    return f"<h3>{escape(title(rows[0]))}</h3><div class=plots>{plots}</div>{table}"


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Make a table whose lines begin with their name."""
    from prfl.evaluation.page.html import table

    lines = [[escape(line[0]), *(f"<td>{escape(cell)}</td>" for cell in line[1:])] for line in body]
    return table(head, lines, "results")


# ---------------------------------------------------------------------------------------------------------- comparison


def comparison(before: Sequence[Row], after: Sequence[Row]) -> Table:
    """Tabulate what changed from one set of results to another, one line for each benchmark that both have.

    Slower or faster where the interval of the ratio leaves out 1; peaks by more than a hundredth; saved bytes exactly.
    """
    old_rows = {row.name: row for row in before}
    table = Table(title="after against before", title_justify="left")
    for name in ("benchmark", "time, after / before", "", "peak MiB", "saved bytes"):
        table.add_column(name, justify="left" if name in ("benchmark", "") else "right", overflow="fold")

    for row in after:
        if row.name not in old_rows:
            table.add_row(f"{row.case}, {row.provider}", "", "new", "", "")
            continue
        old = old_rows.pop(row.name)
        ratio = time_ratio_apart(row.rounds, old.rounds)
        verdict = "slower" if ratio.low > 1 else "faster" if ratio.high < 1 else ""
        peaks = [each.info["memory"].get("peak") for each in (old, row)]
        saved = [each.info["saved_bytes"] for each in (old, row)]
        larger = None not in peaks and peaks[1] > 1.01 * peaks[0]
        verdicts = [verdict, "larger peak" * larger, "saves more" * (saved[1] > saved[0])]
        table.add_row(
            f"{row.case}, {row.provider}",
            str(ratio),
            ", ".join(filter(None, verdicts)),
            DASH if None in peaks else " -> ".join(_mebibytes(each) for each in peaks),
            f"{saved[0]}" if saved[0] == saved[1] else f"{saved[0]} -> {saved[1]}",
        )

    for name in old_rows:
        table.add_row(f"{old_rows[name].case}, {old_rows[name].provider}", "", "gone", "", "")
    return table
