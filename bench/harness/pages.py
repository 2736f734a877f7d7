"""Tables of a page that are rendered from result files, between comments that name the files:

    <!-- bench: ../bench/results/tiny.json operation=lora_linear mode=both -->
    | case | ...
    <!-- /bench -->

Paths are relative to the page.  key=value keeps the rows whose operation, provider, device or setting it is.  With
table=NAME it is the table of a study (study_tables.py).  With plot=PICTURE there is
the plot of costs against size instead, which has a digest of its figures in itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.cases.scale import Curve, by_world
from bench.harness.report import markdown
from bench.harness.results import Row, read
from bench.harness.study_tables import of_files
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write

MARKED = re.compile(r"(<!-- bench: (?P<what>[^>]+?) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)

PLOT, TABLE = "plot=", "table="
ALT = "time, peak and saved memory against frames, resolution, solver steps, gradient steps and batch"


def update(page: Path) -> bool:
    """Write the tables and plots anew; returns whether anything changed."""
    text = page.read_text(encoding="utf-8")
    fresh = rendered(text, page)
    if fresh != text:
        page.write_text(fresh, encoding="utf-8")
    drawn = [write_plot(rows(what, page), picture) for what, picture in old_plots(text, page)]
    return fresh != text or bool(drawn)


def stale(page: Path) -> list[str]:
    """List the markers whose tables are not what their files say."""
    text = page.read_text(encoding="utf-8")
    pairs = zip(MARKED.finditer(text), MARKED.finditer(rendered(text, page)), strict=True)
    changed = [old["what"] for old, fresh in pairs if old["table"] != fresh["table"]]
    return list(dict.fromkeys([*changed, *(what for what, _ in old_plots(text, page))]))


def rendered(text: str, page: Path) -> str:
    """Return the page's text with every table as its files have it.  Raises PrflError where they cannot be read."""
    return MARKED.sub(lambda match: match[1] + _written(match["what"], page) + match[4], text)


def _written(what: str, page: Path) -> str:
    if name := _option(what, TABLE):
        return of_files(name, *(page.parent / word for word in what.split() if "=" not in word))
    if picture := plot_of(what, page):
        return f"![{ALT}]({os.path.relpath(picture, page.parent)})\n"
    return markdown(rows(what, page))


def plot_of(what: str, page: Path) -> Path | None:
    """Return the path of the marker's picture, if it has one."""
    name = _option(what, PLOT)
    return page.parent / name if name else None


def _option(what: str, key: str) -> str:
    return next((word.removeprefix(key) for word in what.split() if word.startswith(key)), "")


def old_plots(text: str, page: Path) -> Iterator[tuple[str, Path]]:
    """Yield the markers whose pictures are not of what their files say, and the pictures."""
    from bench.harness.plots import digest, drawn

    for match in MARKED.finditer(text):
        picture = plot_of(match["what"], page)
        if picture and drawn(picture) != digest(one_world(rows(match["what"], page))):
            yield match["what"], picture


def write_plot(plotted: Sequence[Row], picture: Path) -> Path:
    """Draw costs against size as a picture.  Raises PrflError where the rows are not of one machine and world."""
    from bench.harness.plots import scale

    image = scale(one_world(plotted))
    with atomic_write(picture) as temporary:
        temporary.write_bytes(image)
    return picture


def one_world(plotted: Sequence[Row]) -> list[Curve]:
    worlds = by_world(plotted)
    if len(worlds) != 1:
        what = f"costs against size of {len(worlds)} machines and worlds make {len(worlds)} plots"
        raise PrflError(what, where="python -m bench report --plot", fix="give results of pytest bench/bench_scale.py")
    return worlds[0]


def rows(what: str, page: Path) -> list[Row]:
    words = what.split()
    selected = read([page.parent / word for word in words if "=" not in word])
    for word in words:
        if "=" in word and not word.startswith(PLOT):
            key, _, value = word.partition("=")
            selected = [row for row in selected if str({**row.info, **row.info["settings"]}.get(key)) == value]
    if not selected:
        raise PrflError(f"no rows for '{what}'", where=str(page), fix="mend the marker, or write the results anew")
    return selected
