"""Show text that a user wrote safely, and compare it with valid choices.

Text that is shown cannot control a terminal or change the order of the text beside it.
"""

from __future__ import annotations

import hashlib
import html
import re
import textwrap
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

# Control characters except newline and tab; line separators and marks of writing direction; lone surrogates.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Replace invisible characters by their Python escapes, such as ``\x1b``."""
    return UNSEEN.sub(lambda match: repr(match[0])[1:-1], text)


def wrapped(text: str, width: int) -> str:
    """Wrap lines between words.  No word is broken, so paths can be copied.  Continued lines are indented."""
    lines = []
    for line in text.split("\n"):
        rest = " " * (len(line) - len(line.lstrip()) + 4)
        lines += textwrap.wrap(
            line, max(width, 20), subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def html_text(text: object) -> str:
    """Escape text for an HTML page: invisible characters are shown, and nothing is markup."""
    return html.escape(visible(str(text)))


def of_experts(value: float | Mapping[str, float]) -> str:
    """Write a number, or one number per expert or frame: ``4 (high), 3 (low)``, ``1 (first frame), ...``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{each:g} ({name.replace('_', ' ')})" for name, each in value.items())
    return f"{value:g}"


def markdown_cell(text: str) -> str:
    """Make text for a cell of a markdown table: on one line, without a column or a tag in it."""
    line = " ".join(visible(text).split())
    return line.replace("|", "\\|").replace("<", "&lt;")


def closest(word: object, choices: Sequence[str]) -> str | None:
    """Find the choice whose spelling is closest to ``word``; None if none is similar."""
    matches = get_close_matches(str(word), choices, n=1)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """Write the end of a remedy: the closest choice, and all of them."""
    match = closest(word, choices)
    guess = f"did you mean '{match}'? " if match else ""
    return f"{guess}known: {', '.join(choices)}"


def file_stem(prompt: str) -> str:
    """Make the file name of a prompt: readable, and with a hash so that no two prompts share it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
