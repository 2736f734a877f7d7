"""What ``python -m bench`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.harness import bundle
from bench.harness.pages import update, write_plot
from bench.harness.report import about, comparison, markdown, notes, tables, write_page
from bench.harness.results import read
from prfl.utils.console import console


def report(
    files: Sequence[Path],
    *,
    page: Path | None = None,
    plot: Path | None = None,
    as_markdown: bool = False,
    marked: Path | None = None,
) -> None:
    """Tables of the files' rows; page: write one, too.  marked: its marked tables are written from their files.

    plot: write the costs against size as a picture.  Raises PrflError where they are not of one machine and world.
    """
    rows = read(files)
    if as_markdown and rows:
        print(markdown(rows), end="")
    else:
        for table in tables(rows, console.width):
            console.print(table)
        for line in notes(rows):
            console.print(line, markup=False, soft_wrap=True)

    for file in files:
        if file.suffix == ".jsonl":
            for line in bundle.notes(bundle.read_lines(file)):
                console.print(line, markup=False, soft_wrap=True)

    if page and rows:
        console.print(f"page: {write_page(rows, page)}", markup=False, soft_wrap=True)
    if plot:
        write_plot(rows, plot)
        console.print(f"plot: {plot}", markup=False, soft_wrap=True)
    if marked:
        console.print(f"{marked}: {'updated' if update(marked) else 'as its files say'}", markup=False, soft_wrap=True)


def compare(before: Path, after: Path) -> None:
    old, new = read([before]), read([after])
    for line in [*(f"before: {fact}" for fact in about(old)), *(f"after: {fact}" for fact in about(new))]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(comparison(old, new))
