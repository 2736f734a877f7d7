"""``prfl sample``: draw videos with a trained model, or the base's for people to compare."""

from __future__ import annotations

import argparse

from prfl.commands.options import names
from prfl.config import load_config
from prfl.utils.errors import PrflError

SUMMARY = "draw videos with a trained model"
EXAMPLES = """\
  prfl sample configs/tiny/prfl.yaml                  what this config trained
  prfl sample configs/tiny/prfl.yaml --compare-base   beside the untrained model, from the same noise
  prfl sample configs/tiny/reward.yaml --per-prompt 4 --prompts 20 --dimensions motion,text
                                                      four videos a prompt, and a page on which a person compares them
"""
CONFIG = "one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compare-base", action="store_true", help="draw each video with the untrained model too")
    parser.add_argument("--per-prompt", type=int, metavar="N", help="draw N videos a prompt, for a person to compare")
    parser.add_argument("--prompts", type=int, metavar="N", help="of so many training prompts (with --per-prompt)")
    parser.add_argument("--dimensions", type=names, metavar="A,B", help="what is asked of a pair (with --per-prompt)")


def run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.per_prompt is None:
        if options.prompts is not None or options.dimensions is not None:
            raise PrflError("they need --per-prompt", where="--prompts, --dimensions", fix="--per-prompt 4")

        from prfl.runs.sample import sample

        return sample(config, compare_base=options.compare_base)
    if options.compare_base:
        raise PrflError("people compare the videos of one model", where="--compare-base", fix="leave it out")

    from prfl.labels.draw import draw

    draw(config, options.per_prompt, prompts=options.prompts, dimensions=options.dimensions)
