"""``prfl unpack``: videos that lie inside a parquet file or a data set of the hub, as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfl.utils.errors import PrflError
from prfl.utils.text import visible

SUMMARY = "write out videos that lie inside a parquet file or a hub data set"
EXAMPLES = """\
  prfl unpack train.parquet clips/
      clips/videos/000000-video.mp4, its prompt beside it as a text, and clips/table.jsonl with all other columns
  prfl unpack owner/name:config clips/ --split train --most 200
      from the hub, the first 200 rows, as they come; needs `pip install datasets`
  then: prfl labels import clips/table.jsonl --preset NAME      where people labelled them
        prfl init clips/videos                                  where they have prompts and no labels
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a .parquet file, a folder of them, or owner/name[:config]")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the files go")
    parser.add_argument("--split", default="train", help="of a data set of the hub; default: train")
    parser.add_argument("--most", type=int, metavar="N", help="take no more than N rows")


def run(options: argparse.Namespace) -> None:
    if options.most is not None and options.most < 1:
        raise PrflError(f"{options.most} rows are none", where="--most", fix="1 or more")

    from prfl.labels.unpack import unpack

    print(visible(unpack(options.source, options.folder, options.split, options.most)))
