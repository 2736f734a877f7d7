"""``prfl export``: write what a run trained for others to load."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfl.utils.text import visible

SUMMARY = "write what a run trained for others to load"
EXAMPLES = """\
  prfl export runs/tiny-policy                      one LoRA file for diffusers and ComfyUI, and a model card
  prfl export runs/tiny-policy --merged               the whole transformer too, as a diffusers folder
  prfl export runs/tiny-reward --push owner/name    a reward, uploaded to the Hugging Face hub
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: RUN/export")
    parser.add_argument("--name", help="of the file and of the card; default: the run folder's name")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the LoRA file")
    parser.add_argument("--merged", action="store_true", help="write the merged transformer too")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private (with --push)")


def run(options: argparse.Namespace) -> None:
    from prfl.export import export_run

    wanted = {name: getattr(options, name) for name in ("out", "name", "dtype", "merged", "push", "private")}
    print(visible(f"exported: {export_run(options.run, **wanted)}"))
