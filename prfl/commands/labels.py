"""``prfl labels``: pairs for people to compare, their answers joined, and tables of labels as manifests."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfl.commands.options import add_command, names, questions, span
from prfl.utils.errors import PrflError
from prfl.utils.text import did_you_mean, visible

if TYPE_CHECKING:
    from prfl.labels.asking import Asked

SUMMARY = "labels of people: a page to compare videos on, several people's answers, tables"
PAGE_EXAMPLES = """\
  prfl labels page clips/                           every video below clips/, with the prompt in the .txt beside it
  prfl labels page clips/ --prompt "a dog runs" --dimensions "motion=Which moves more naturally?" --pairs 60
                                                    videos of one prompt, a question in words, 60 pairs
  prfl labels page manifest.jsonl --dimensions motion,text --one-file
                                                    the videos of a manifest; a page to send away, videos and all
  prfl labels page clips/ --pairs 60 --choose uncertain --head runs/reward/reward
                                                    first the pairs that this head is least sure of

The page, label.html, stands beside the videos and needs no server.  It saves preferences.jsonl there, or
preferences-NAME.jsonl for each person: name it as data.manifest, or join several by prfl labels merge.
"""
SERVE_EXAMPLES = """\
  prfl labels serve clips/                          the same page at http://127.0.0.1:8765/, for this machine
  prfl labels serve clips/ --host 0.0.0.0           for everybody on the network who has the address that is printed

Each person gives a name; every answer is written to a file of their own beside the videos before the page calls it
saved.  Stopped and started again, it goes on.  What is asked is chosen as by labels page.
"""
MERGE_EXAMPLES = """\
  prfl labels merge clips/preferences-*.jsonl       writes clips/preferences.jsonl
  prfl labels merge ~/Downloads/preferences-ann.jsonl ~/Downloads/preferences-bo.jsonl --root clips/
                                                    files that are not beside their videos

Where several people answered one pair, the side with more votes is the better; with as many for both it is a tie.
"""
IMPORT_EXAMPLES = """\
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

presets
  videogen-rewardbench, videoalign, videofeedback, videofeedback2, mj-bench-video, visionreward, visionreward-train,
  genai-bench, genai-bench-video, rapidata, rapidata-i2v, rapidata-rich, videodpo, solireward, hpdv2, hpdv3,
  va-judger-bench; of tools: label-studio, argilla, google-forms
"""
ASKED = "what is asked, in words or not; repeatable; default: which is better overall, or what the head scores"
UNSURE = "a saved reward, for --choose uncertain: what is unsure; of several, where they differ most"
EXAMPLES = f"{PAGE_EXAMPLES}\n{IMPORT_EXAMPLES}"
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
    page = add_command(actions, "page", "write a page on which people compare videos", PAGE_EXAMPLES)
    page.set_defaults(action=write_page)
    add_asked(page)
    page.add_argument("--one-file", action="store_true", help="put the videos into the page, in place of links to them")

    serve = add_command(actions, "serve", "serve that page to several people", SERVE_EXAMPLES)
    serve.set_defaults(action=serve_page)
    add_asked(serve)
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    serve.add_argument("--port", type=int, default=8765, metavar="N", help="default: 8765; 0 is any that is free")

    merge = add_command(actions, "merge", "join the answers of several people", MERGE_EXAMPLES)
    merge.set_defaults(action=merge_files)
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what the page saved, one for each person")
    merge.add_argument("--out", type=Path, metavar="FILE", help="the manifest; default: preferences.jsonl in the root")
    merge.add_argument("--root", type=Path, metavar="FOLDER", help="of the videos; default: the files' folder")

    add_import(actions)


def add_asked(action: argparse.ArgumentParser) -> None:
    """Add the options that say what is asked."""
    action.add_argument("source", type=Path, metavar="FOLDER", help="a folder of videos, or a manifest (.jsonl)")
    action.add_argument("--dimensions", type=questions, action="append", metavar="NAME=QUESTION", help=ASKED)
    action.add_argument("--prompt", help="of videos that have no .txt beside them, as a.txt for a.mp4")
    action.add_argument("--pairs", type=int, metavar="N", help="ask so many; default: every two videos of a prompt")
    action.add_argument("--choose", choices=["all", "uncertain"], default="all", help="which come first; see --head")
    action.add_argument("--head", action="append", metavar="FOLDER", help=UNSURE)
    action.add_argument("--model", help="the video model that it reads; default: what it was trained on")
    action.add_argument("--follow-links", action="store_true", help="a manifest's links may lead out of its folder")


def add_import(actions: Any) -> None:
    action = add_command(actions, "import", "turn a table of labels into a manifest", IMPORT_EXAMPLES)
    action.set_defaults(action=import_file)
    action.add_argument("file", type=Path, metavar="FILE", help="one row a video, or a pair")
    action.add_argument("--out", type=Path, metavar="FILE", help="the manifest; default: FILE.jsonl")
    action.add_argument(
        "--preset", metavar="NAME", help="the layout of a public set or a tool; --preset help lists them"
    )
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
    options.action(options)


def asked(options: argparse.Namespace) -> Asked:
    """Choose what is asked, and say it."""
    from prfl.labels.asking import asked_of, tell

    chosen = asked_of(
        options.source,
        {name: text for each in options.dimensions or () for name, text in each.items()},
        prompt=options.prompt,
        count=options.pairs,
        choose=options.choose,
        heads=options.head or (),
        model=options.model,
        follow_links=options.follow_links,
    )
    tell(chosen)
    return chosen


def write_page(options: argparse.Namespace) -> None:
    from prfl.labels import page
    from prfl.labels.asking import PAGE
    from prfl.utils.console import console, progress

    chosen = asked(options)
    path, shown = chosen.folder / PAGE, progress("looking at the videos")
    page.write_page(path, chosen.pairs, chosen.questions, one_file=options.one_file, progress=shown)
    console.say(f"open in a browser: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


def serve_page(options: argparse.Namespace) -> None:
    from prfl.labels.serve import serve
    from prfl.utils.console import progress

    serve(asked(options), options.host, options.port, progress("looking at the videos"))


def merge_files(options: argparse.Namespace) -> None:
    from prfl.labels.merge import merge

    print(visible(merge(options.files, options.root, options.out)))


def import_file(options: argparse.Namespace) -> None:
    from prfl.labels.layout import FIELDS, Layout
    from prfl.labels.presets import PRESETS
    from prfl.labels.table import import_table

    layout = Layout()
    if options.preset is not None:
        if options.preset not in PRESETS:
            fix = (
                f"one of {', '.join(PRESETS)}" if options.preset == "help" else did_you_mean(options.preset, [*PRESETS])
            )
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
