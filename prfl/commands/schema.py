"""``prfl schema``: write the JSON schema of configs, for editors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prfl.config import json_schema

SUMMARY = "write the JSON schema of configs, for editors"
EXAMPLES = """\
  prfl schema prfl.schema.json

With the YAML extension of VS Code (and any editor that uses yaml-language-server), make this the first line of a
config, and keys are completed, explained and checked while you type:
  # yaml-language-server: $schema=prfl.schema.json
The path is relative to the config.
"""
PRINTS_RESULT = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="where to; default: the terminal")


def run(options: argparse.Namespace) -> None:
    text = json.dumps(json_schema(), indent=2) + "\n"
    if options.file is None:
        print(text, end="")
        return

    from prfl.utils.files import atomic_write

    with atomic_write(options.file) as temporary:
        temporary.write_text(text, encoding="utf-8")
