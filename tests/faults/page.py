"""docs/troubleshooting.md: every message of prfl, as the tests of this folder meet it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs/troubleshooting.md"
INTRODUCTION = """\
# Troubleshooting

prfl stops with one message that says what is wrong, where (a file, or a key of the config), and how to mend it. These
are the messages of the faults that the tests cause, as they were printed; your files have other names. Search this
page for a few words of your message. `prfl doctor CONFIG` finds many of these faults before a run, without weights.

`python -m tests.faults --update docs/troubleshooting.md` causes every fault and writes this page; with `-k WORDS` only
the faults that have these words in their names.
"""
PART = re.compile(
    r"^## (?P<section>[^\n]+)$|^\*\*(?P<fault>[^\n]+)\*\*\n\n```text\n(?P<message>.*?)\n```$", re.M | re.S
)


class Told(NamedTuple):
    section: str
    message: str


def read(page: str) -> dict[str, Told]:
    """Read the message of each fault from the page."""
    section, told = "", {}
    for part in PART.finditer(page):
        section = part["section"] or section
        if part["fault"]:
            told[part["fault"]] = Told(section, part["message"])
    return told


def rendered(told: Mapping[str, Told]) -> str:
    """Write the page, section by section."""
    text = INTRODUCTION
    for section in dict.fromkeys(each.section for each in told.values()):
        text += f"\n## {section}\n"
        for fault, each in told.items():
            if each.section == section:
                text += f"\n**{fault}**\n\n```text\n{each.message}\n```\n"
    return text
