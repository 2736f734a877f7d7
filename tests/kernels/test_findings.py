"""The list of the review's findings names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_test_that_the_findings_name_is_there() -> None:
    page = (TESTS.parent / "kernels/README.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (TESTS / file).read_text()]
    assert not missing


def test_every_finding_has_a_test_or_a_reason() -> None:
    page = (TESTS.parent / "kernels/README.md").read_text()
    lines = page[page.index("## Findings of the review") :].splitlines()
    rows = [line.split("|")[1:3] for line in lines if line.startswith("| ") and not line.startswith("| **")]
    wanting = [finding for finding, held in rows[1:] if not re.search(r"::|left|timed first", held)]
    assert len(rows) > 40 and not wanting
