"""``prfl labels import``: a manifest from labels that people gave."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from prfl.commands.options import add_command, names, span
from prfl.utils.errors import PrflError
from prfl.utils.text import did_you_mean, visible

SUMMARY = "labels that people gave"
EXAMPLES = """\
  prfl labels import ratings.csv                    video,prompt,split,motion,text with numbers from 0 to 1
  prfl labels import ratings.csv --scale 1:5        ... or from 1 to 5; --scale text=1:3,motion=1:5 for each
  prfl labels import pairs.csv --out pairs.jsonl    prompt,a,b,motion with a, b or tie, or words for them
  prfl labels import train.csv --columns a=path_A,b=path_B,prompt=caption --dimensions VQ,MQ --root /data/videos
                                                    other names of columns, and videos in another folder
  prfl labels import votes.parquet --dimensions motion=score_a:score_b --margin 0.05
                                                    two scores compared; nearly equal ones are a tie
  prfl labels import videogen-rewardbench.csv --preset videogen-rewardbench --root videos --skip-missing
                                                    a public set as it is, as far as its videos are here

Files are CSV, TSV, JSON, JSON lines or parquet.  Paths in a file are relative to its folder, or to --root.  Columns
that hold none of prompt, video, a, b, split and rater are dimensions.  Where a column names the rater, several answers
to the same are joined: the majority of choices, the mean of ratings; how far raters agree is printed.
"""
OPTIONS = {
    "columns": "which column holds prompt, video, a, b, split or rater, as a=path_A; or a path made of columns, as "
    "video=clips/{id}.mp4",
    "dimensions": "the answers, as VQ,MQ, motion=COLUMN or motion=SCORE_A:SCORE_B; default: all other columns",
    "scale": "the worst and the best rating, for all or as NAME=LOW:HIGH,...; default: 0:1",
    "root": "the folder that paths are relative to; the manifest is written there; default: the file's folder",
}


def pairs_of(text: str) -> dict[str, str]:
    """Read NAME=VALUE,...; a name by itself is its own value."""
    return {name.strip(): (value or name).strip() for name, _, value in (each.partition("=") for each in names(text))}


def scales(text: str) -> dict[str, tuple[float, float]]:
    """Read LOW:HIGH for all ratings (under the name ""), or NAME=LOW:HIGH,..."""
    if "=" not in text:
        return {"": span(text)}
    return {name: span(value) for name, value in pairs_of(text).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    action = add_command(actions, "import", "turn a table of labels into a manifest", EXAMPLES)
    action.add_argument("file", type=Path, metavar="FILE", help="one row a video, or a pair")
    action.add_argument("--out", type=Path, metavar="FILE", help="the manifest; default: FILE.jsonl")
    action.add_argument("--preset", metavar="NAME", help="the layout of a public set or a tool")
    action.add_argument("--columns", type=pairs_of, default={}, metavar="NAME=COLUMN,...", help=OPTIONS["columns"])
    action.add_argument("--dimensions", type=pairs_of, default={}, metavar="NAME,...", help=OPTIONS["dimensions"])
    action.add_argument("--ignore", type=names, default=[], metavar="COLUMN,...", help="columns that are no answers")
    action.add_argument("--scale", type=scales, default={}, metavar="LOW:HIGH", help=OPTIONS["scale"])
    action.add_argument("--margin", type=float, metavar="M", help="scores that differ by no more are a tie; default: 0")
    action.add_argument("--root", type=Path, metavar="FOLDER", help=OPTIONS["root"])
    action.add_argument(
        "--join", action="store_true", help="join several answers to the same, without a rater's column"
    )
    action.add_argument("--skip-missing", action="store_true", help="leave rows out whose videos are not there")


def run(options: argparse.Namespace) -> None:
    from prfl.labels.layout import FIELDS, Layout
    from prfl.labels.presets import PRESETS
    from prfl.labels.table import import_table

    layout = Layout()
    if options.preset is not None:
        if options.preset not in PRESETS:
            fix = did_you_mean(options.preset, list(PRESETS))
            raise PrflError(f"there is no preset '{options.preset}'", where="command line: --preset", fix=fix)
        layout = PRESETS[options.preset]
    if unknown := options.columns.keys() - set(FIELDS):
        fix = did_you_mean(min(unknown), list(FIELDS))
        raise PrflError(f"'{min(unknown)}' is nothing that a column holds", where="command line: --columns", fix=fix)
    layout = replace(
        layout,
        columns={**layout.columns, **options.columns},
        dimensions=options.dimensions or layout.dimensions,
        ignore=[*layout.ignore, *options.ignore],
        scales={**layout.scales, **options.scale},
        margin=layout.margin if options.margin is None else options.margin,
        join=layout.join or options.join,
    )
    print(visible(import_table(options.file, options.out, layout, options.root, options.skip_missing)))
