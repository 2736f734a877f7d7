"""Text that a user wrote: made fit to be shown, and compared with the words that there are.

Nothing in a shown text can steer a terminal or reorder what stands beside it.
"""

from __future__ import annotations

import hashlib
import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

# Control characters but for the line's end and the tab; marks that turn the direction of writing; halves of surrogates.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Write what cannot be seen as Python writes it: an escape is ``\x1b``."""
    return UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def wrapped(text: str, width: int) -> str:
    """Break lines between words, none of which is cut: a path can still be copied.  What goes on stands further in."""
    lines = []
    for line in text.split("\n"):
        rest = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(
            line, max(width, 20), subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def html_text(text: object) -> str:
    """Make text for a page: visible, and no part of it is markup."""
    return html.escape(visible(str(text)))


def of_experts(value: float | Mapping[str, float]) -> str:
    """Write a number, or one of each of two experts or frames: ``4 (high), 3 (low)``, ``1 (first frame), ...``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{each:g} ({name.replace('_', ' ')})" for name, each in value.items())
    return f"{value:g}"


def markdown_cell(text: str) -> str:
    """Make text for a cell of a markdown table: on one line, without a column or a tag in it."""
    line = " ".join(visible(text).split())
    return line.replace("|", "\\|").replace("<", "&lt;")


def closest(word: object, choices: Sequence[str]) -> str | None:
    """Find the choice that is spelt nearly as ``word`` is; None where no choice is."""
    matches = get_close_matches(str(word), choices, n=1)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Write the end of a remedy: the closest choice, and all of them."""
    match = closest(word, choices)
    guess = f"did you mean '{match}'? " if match else ""
    return f"{guess}known: {', '.join(choices)}"


def file_stem(prompt: str) -> str:
    """Name a prompt's files: a name that a person recognises and that no other prompt has."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
