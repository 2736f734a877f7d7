"""``prfl schema``: write the JSON schema of configs, for editors; or the page of every key, for people."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prfl.config import json_schema
from prfl.config.page import configuration_page

SUMMARY = "write the JSON schema of configs, for editors"
EXAMPLES = """\
  prfl schema prfl.schema.json

With the YAML extension of VS Code (and any editor that uses yaml-language-server), make this the first line of a
config, and keys are completed, explained and checked while you type:
  # yaml-language-server: $schema=prfl.schema.json
The path is relative to the config.

  prfl schema docs/configuration.md
      every key with its meaning, default and bounds, as a page
"""
PRINTS_RESULT = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="where to (.md: a page to read); default: the terminal"
    )


def run(options: argparse.Namespace) -> None:
    page = options.file is not None and options.file.suffix == ".md"
    text = configuration_page() if page else json.dumps(json_schema(), indent=2) + "\n"
    if options.file is None:
        print(text, end="")
        return

    from prfl.utils.files import atomic_write

    with atomic_write(options.file) as temporary:
        temporary.write_text(text, encoding="utf-8")
