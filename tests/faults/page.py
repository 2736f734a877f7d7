"""docs/troubleshooting.md: every message of prfl, as the tests of this folder meet it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.faults.planting import FAULTS

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
INTRODUCTION = """\
# Troubleshooting

prfl stops with one message that says what is wrong, where (a file, or a key of the config), and how to mend it. These
are the messages that the tests plant, as they were printed; your files have other names. Search this page for a few
words of yours. `prfl doctor CONFIG` finds many of them before a run, and needs no weights.

`python -m tests.faults --update docs/troubleshooting.md` plants every fault and writes this page; behind it, `-k WORDS`
does so for the faults with these words in their names.
"""
ENTRY = re.compile(r"^\*\*(?P<name>.+)\*\*\n\n```text\n(?P<message>.*?)\n```$", re.MULTILINE | re.DOTALL)


def entry(name: str, message: str) -> str:
    return f"**{name}**\n\n```text\n{message}\n```\n"


def messages(page: str) -> dict[str, str]:
    """Read the message of each fault from the page."""
    return {match["name"]: match["message"] for match in ENTRY.finditer(page)}


def rendered(message_of: Mapping[str, str]) -> str:
    """Write the page: a section for each module of faults, in the order of FAULTS."""
    return "".join([INTRODUCTION, *_sections(message_of)])


def _sections(message_of: Mapping[str, str]) -> Iterator[str]:
    titles: dict[str, str] = {}
    for fault in FAULTS:
        documentation = sys.modules[fault.plant.__module__].__doc__ or ""
        title = documentation.splitlines()[0].rstrip(".")
        if fault.name in message_of:
            if title not in titles:
                titles[title] = f"\n## {title}\n"
                yield titles[title]
            yield f"\n{entry(fault.name, message_of[fault.name])}"
