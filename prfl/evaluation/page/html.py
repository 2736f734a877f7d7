"""Pieces of HTML that every section is made of.  What a user wrote goes through ``html_text``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from prfl.evaluation.metrics import Interval
from prfl.utils.text import html_text


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{html_text(heading)}</h2>{''.join(parts)}</section>"


def breakable(name: str) -> str:
    """Write a name that may go on in the next line after a slash."""
    return html_text(name).replace("/", "/<wbr>")


def quiet(text: str) -> str:
    return f"<p class=quiet>{html_text(text)}</p>"


def details(title: str, content: str) -> str:
    return f"<details><summary>{html_text(title)}</summary>{content}</details>"


def scrolled(content: str, label: str, kind: str = "wide") -> str:
    """Wrap what may be wider than the page: it scrolls by itself, by the keyboard too."""
    return f'<div class={kind} tabindex=0 role=group aria-label="{html_text(label)}">{content}</div>'


def image(data: bytes, alt: str) -> str:
    return f'<img alt="{html_text(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def plot(data: bytes, name: str, meaning: str = "") -> str:
    """Show one picture of one plot, with what its name means below it."""
    below = f"<b>{html_text(name)}</b>" + (f" <small>{html_text(meaning)}</small>" if meaning else "")
    return f"<figure>{image(data, name)}<figcaption>{below}</figcaption></figure>"


def table(head: Sequence[str], body: Sequence[Sequence[str]], label: str) -> str:
    """Make a table of cells that are HTML already (``<td>...</td>``); the first of a line is its name, as HTML."""
    columns = "".join(f"<th scope=col>{html_text(name)}</th>" for name in head)
    lines = "".join(f"<tr><th scope=row>{first}</th>{''.join(cells)}</tr>" for first, *cells in body)
    return scrolled(f"<table><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table>", label)


def cell(fields: dict[str, Any] | None, signed: bool = False) -> str:
    """Show an interval; signed: as a difference, marked where it is clear of 0."""
    if fields is None:
        return "<td>–</td>"
    interval = Interval(**fields)
    sign = "+" if signed else ""
    clear = " class=clear" if signed and is_clear(interval) else ""
    text = f"{interval.value:{sign}.3f} <small>[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]</small>"
    return f"<td{clear}>{text}</td>"


def is_clear(difference: Interval) -> bool:
    """Tell whether an interval leaves 0 out."""
    return difference.low > 0 or difference.high < 0
