"""Tables of a README that are rendered from result files, between comments that name the files:

    <!-- bench: bench/results/tiny.json operation=lora_linear mode=both -->
    | case | ...
    <!-- /bench -->

Paths are relative to the README.  key=value keeps the rows whose operation, provider, device or setting it is.
"""

from __future__ import annotations

import re
from pathlib import Path

from prfl.benchmark.report import markdown
from prfl.benchmark.results import Row, read
from prfl.errors import PrflError

MARKED = re.compile(r"(<!-- bench: (?P<what>[^>]+?) -->\n)(?P<table>.*?)(<!-- /bench -->)", re.DOTALL)


def update(readme: Path) -> bool:
    """Writes the tables anew; whether anything changed."""
    text = readme.read_text()
    fresh = rendered(text, readme)
    if fresh != text:
        readme.write_text(fresh)
    return fresh != text


def stale(readme: Path) -> list[str]:
    """The markers whose tables are not what their files say."""
    text = readme.read_text()
    pairs = zip(MARKED.finditer(text), MARKED.finditer(rendered(text, readme)), strict=True)
    return [old["what"] for old, fresh in pairs if old["table"] != fresh["table"]]


def rendered(text: str, readme: Path) -> str:
    """The README's text with every table as its files have it.  Raises PrflError where they cannot be read."""
    return MARKED.sub(lambda found: found[1] + markdown(rows(found["what"], readme)) + found[4], text)


def rows(what: str, readme: Path) -> list[Row]:
    words = what.split()
    found = read([readme.parent / word for word in words if "=" not in word])
    for word in words:
        if "=" in word:
            key, _, value = word.partition("=")
            found = [row for row in found if str({**row.info, **row.info["settings"]}.get(key)) == value]
    if not found:
        raise PrflError(f"no rows for '{what}'", where=str(readme), fix="mend the marker, or write the results anew")
    return found
