"""``prfl doctor``: say whether this machine can run a config, or anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prfl.config import Stage, load_stages

SUMMARY = "say whether this machine can run a config, or anything"
EXAMPLES = """\
  prfl doctor                                    this machine: versions, device, attention, kernels, disk, hub, video
  prfl doctor configs/wan2.1-1.3b/prfl.yaml      and whether a run of this config could work on it

The exit code is 2 when a run could not work; the reasons are listed last.
"""
CONFIG = "optional"
PRINTS_RESULT = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    stages: Sequence[Stage] = load_stages(options.config, options.overrides) if options.config else ()

    from prfl.runs.doctor import doctor

    doctor(stages)
