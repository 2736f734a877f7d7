"""``prfl eval``: measure a reward per noise level, or a policy beside its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from prfl.config import load_config
from prfl.utils.errors import PrflError

NAME = "eval"
SUMMARY = "measure a reward per noise level, on held-out clips"
EXAMPLES = """\
  prfl eval --run runs/tiny-reward                          a finished run: its reward by noise level
  prfl eval --run runs/tiny-policy                          a finished run: its policy beside the base, test prompts
  prfl eval --run runs/tiny-reward --split test             the same on the rows that are for the end
  prfl eval configs/tiny/reward.yaml                        the head that this config trained
  prfl eval --head runs/tiny-reward/reward                  a saved reward, on the clips that it was trained for
  prfl eval configs/tiny/reward.yaml --head frozen=FOLDER --head pixel=FOLDER
                                                            several, side by side
  prfl eval configs/tiny/reward.yaml --manifest FILE        on other labelled videos, out of domain say
"""
CONFIG = "optional"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run, in place of a config")
    parser.add_argument("--head", action="append", metavar="[NAME=]FOLDER", help="a saved reward; may be repeated")
    parser.add_argument("--split", choices=("validation", "test"), help="of the config's clips; default: validation")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="labelled videos, all of them held out")


def run(options: argparse.Namespace) -> None:
    if options.config and options.run:  # a run brings its config, so what stands there is a key to change
        if "=" not in options.config:
            raise PrflError("a config and a run are given", where="prfl eval", fix="give one of them")
        options.overrides.insert(0, options.config)
        options.config = None
    if options.config is None and options.head is None and options.run is None:
        raise PrflError("nothing to measure", where="prfl eval", fix="give --run FOLDER, a config, or --head FOLDER")
    config = load_config(options.config, options.overrides) if options.config else None

    from prfl.runs.evaluate import evaluate

    source: dict[str, Any] = {} if config else {"run": options.run, "overrides": options.overrides}
    if options.split and options.manifest:
        raise PrflError("all rows of another manifest are held out", where="--split", fix="leave it out")
    heads = named_heads(options.head or []) or None
    evaluate(config, heads=heads, manifest=options.manifest, split=options.split or "validation", **source)


def named_heads(texts: list[str]) -> dict[str, Path]:
    """Return the folders of ``--head [NAME=]FOLDER`` by name.  Raises PrflError for two of one name."""
    heads: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.rpartition("=")
        name = name or (folder if len(texts) > 1 else "head")
        if heads.setdefault(name, Path(folder)) != Path(folder):
            raise PrflError(f"two heads are called {name!r}", where="--head", fix="give each a name of its own")
    return heads
