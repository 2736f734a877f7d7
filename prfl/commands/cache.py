"""``prfl cache``: encode clips and prompts once, before training."""

from __future__ import annotations

import argparse

from prfl.commands.options import in_file
from prfl.config import load_stages

SUMMARY = "encode clips and prompts once, before training"
EXAMPLES = """\
  prfl cache configs/tiny/reward.yaml

A cache that was stopped goes on where it stopped.  Videos that cannot be read are listed at the end, with exit code 2
unless data.skip_unreadable is true.
"""
CONFIG = "one"
GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)

    from prfl.runs.cache import cache

    for stage in stages:
        with in_file(stage.path):
            cache(stage.config)
