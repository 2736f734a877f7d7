"""``prfl init``: write a project for a folder of videos, or for a manifest of preferences."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from prfl.utils.text import visible

SUMMARY = "write a commented project for a folder of videos"
EXAMPLES = """\
  prfl init clips/
      clips/ has a.mp4 beside a.txt, its prompt: writes clips-prfl/ with a reward, a policy, and what to do with them
  prfl init clips/ --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out mine
      for another video model than the small one inside prfl
  prfl init labels.jsonl
      a manifest of people's labels, as `prfl labels import` and the label page write it

The size, the rate and the length of a clip are chosen after the headers of the videos.  Nothing is trained, encoded or
overwritten.  `prfl train clips-prfl/project.yaml` runs what was written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER", help="of videos with texts beside them; or a manifest")
    parser.add_argument("--model", default="shapes", help="a diffusers folder or hub id; default: the one in prfl")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the project; default: FOLDER-prfl, here")


def run(options: argparse.Namespace) -> None:
    from prfl.runs.project import write_project

    out = options.out or Path(re.sub(r"[^\w.-]+", "-", options.source.resolve().stem) + "-prfl")
    for path in write_project(options.source, out, options.model):
        print(visible(f"written: {path}"))
    print(visible(f"next: prfl train {out / 'project.yaml'}"))
