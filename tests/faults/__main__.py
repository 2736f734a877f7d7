"""Prints the table of faults and messages as markdown: ``python -m tests.faults``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


class Table:
    """pytest plugin: collects the messages and prints them at the end."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call" and "message" in found:
            self.rows.append((found["fault"], found["message"]))

    def print(self) -> None:
        print("| fault | message |\n| --- | --- |")
        for name, message in self.rows:
            cell = message.replace("|", "\\|").replace("\n  ", "<br>").replace("\n", "<br>")
            print(f"| {name} | {cell} |")


if __name__ == "__main__":
    table = Table()
    plain = ["-o", "addopts=--import-mode=importlib"]  # types are checked only where prfl is not imported yet
    code = pytest.main(
        [str(Path(__file__).with_name("test_faults.py")), *plain, "-q", "-k", "test_fault["], plugins=[table]
    )
    table.print()
    sys.exit(code)
