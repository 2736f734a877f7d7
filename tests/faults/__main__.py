"""Plants every fault and writes the messages.

python -m tests.faults [--update docs/troubleshooting.md] [-k WORDS]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from tests.faults.page import Told, read, rendered


class Messages:
    """pytest plugin that collects the message of each fault."""

    def __init__(self) -> None:
        self.by_fault: dict[str, Told] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when == "call" and "message" in properties:
            self.by_fault[properties["fault"]] = Told(properties["section"], properties["message"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write them there; default: the terminal")
    parser.add_argument("-k", metavar="WORDS", default="", help="only faults with these words in their names")
    options = parser.parse_args()

    # Types are checked only where prfl is not imported yet.
    plugin, plain = Messages(), ["-o", "addopts=--import-mode=importlib", "-q", "--tb=no"]
    chosen = f"test_fault[ and ({options.k})" if options.k else "test_fault["
    code = pytest.main([str(Path(__file__).with_name("test_faults.py")), *plain, "-k", chosen], plugins=[plugin])
    if options.update is None or not plugin.by_fault:
        print(rendered(plugin.by_fault))
        return code
    before = read(options.update.read_text(encoding="utf-8")) if options.k else {}
    options.update.write_text(rendered({**before, **plugin.by_fault}), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
