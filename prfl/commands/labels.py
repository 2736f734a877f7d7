"""``prfl labels import``: a manifest from labels that people gave."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfl.commands.options import add_command, span
from prfl.utils.text import visible

SUMMARY = "labels that people gave"
EXAMPLES = """\
  prfl labels import ratings.csv                    video,prompt,split,motion,text with numbers from 0 to 1
  prfl labels import ratings.csv --scale 1:5        ... or from 1 to 5
  prfl labels import pairs.csv --out pairs.jsonl    prompt,a,b,motion with a, b or tie

Paths in the file are relative to its folder.  Other columns than video, prompt, a, b and split are dimensions.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = add_command(actions, "import", "turn a CSV of labels into a manifest", EXAMPLES)
    action.add_argument("file", type=Path, metavar="FILE.csv", help="one line a video, or a pair")
    action.add_argument("--out", type=Path, metavar="FILE", help="the manifest; default: FILE.jsonl")
    action.add_argument("--scale", type=span, default=(0.0, 1.0), metavar="LOW:HIGH", help="of ratings; default: 0:1")


def run(options: argparse.Namespace) -> None:
    from prfl.labels.table import import_csv

    print(visible(import_csv(options.file, options.out or options.file.with_suffix(".jsonl"), options.scale)))
