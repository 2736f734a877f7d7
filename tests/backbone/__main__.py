"""Runs the tests of every family and writes what they measured, with the slow ones.

python -m tests.backbone [--update]
"""

from __future__ import annotations

import sys

import pytest

from tests.backbone.table import BLOCK, MEASURED, PAGE, Cell, rendered, worst

FILES = ("tests/backbone/test_families.py", "tests/estimate/test_families.py")


class Measured:
    """pytest plugin that collects the cells of the table."""

    def __init__(self) -> None:
        self.cells: list[Cell] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.cells += [value for name, value in report.user_properties if name == MEASURED]


def main() -> int:
    plugin = Measured()
    code = pytest.main([*FILES, "-o", "addopts=--import-mode=importlib", "-q", "-m", ""], plugins=[plugin])
    table = rendered(worst(plugin.cells))
    print(table)
    if "--update" in sys.argv and not code:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda block: block[1] + table + block[2], text), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
