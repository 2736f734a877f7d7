"""The diffs of docs/extending.md fit the tree as it is, and each of them is short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DIFFS = re.findall(
    r"^## ([^\n]+)\n.*?^```diff\n(.*?)^```$", (REPOSITORY / "docs/extending.md").read_text(), re.M | re.S
)
MOST = 80  # changed lines: less than a page


@pytest.mark.parametrize(("title", "diff"), DIFFS, ids=[title for title, _ in DIFFS])
def test_a_diff_applies_and_is_short(title: str, diff: str) -> None:
    applied = subprocess.run(
        ["git", "apply", "--check", "-"], input=diff, cwd=REPOSITORY, text=True, capture_output=True
    )
    assert applied.returncode == 0, applied.stderr
    assert len(re.findall(r"^[+-](?![+-])", diff, re.M)) < MOST


def test_there_is_one_for_each_kind() -> None:
    assert {"A solver", "A method", "A reward"} <= {title for title, _ in DIFFS}
