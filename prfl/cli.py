"""The command line: reads arguments, loads the config, calls prfl.commands.  No logic of its own.

prfl.commands is imported inside the commands, so that ``prfl --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from prfl.config import Config, dump_resolved, load_config, load_stages
from prfl.config.messages import all_keys
from prfl.errors import PrflError

TRAIN_EXAMPLES = """\
  prfl train configs/tiny.yaml
      the whole story on the model inside the package: a reward head, then PRFL from it, then the report
  prfl train configs/tiny/prfl.yaml --dry-run
      check a config and print it with every default
  prfl train configs/tiny/prfl.yaml training.steps=10 run=runs/try
      change keys of a config without editing it
  prfl train configs/tiny.yaml prfl.training.steps=10
      where a config has stages, the stage's name comes first
  torchrun --nproc_per_node 2 -m prfl.cli train CONFIG     (or: accelerate launch -m prfl.cli train CONFIG)
      several processes, one a GPU, share out training.batch, the cache and the evaluation: the same result
"""
CACHE_EXAMPLES = """\
  prfl cache configs/tiny/reward.yaml

A cache that was stopped goes on where it stopped.  Videos that cannot be read are listed at the end, with exit code 2
unless data.skip_unreadable is true.
"""
EVAL_EXAMPLES = """\
  prfl eval configs/tiny/reward.yaml                        the head that this config trained
  prfl eval --head runs/tiny-reward/reward                  a saved reward, on the clips that it was trained for
  prfl eval configs/tiny/reward.yaml --head frozen=FOLDER --head pixel=FOLDER
                                                            several, side by side
  prfl eval configs/tiny/reward.yaml --manifest FILE        on other labelled videos, out of domain say
"""
SAMPLE_EXAMPLES = """\
  prfl sample configs/tiny/prfl.yaml                  what this config trained
  prfl sample configs/tiny/prfl.yaml --compare-base   beside the untrained model, from the same noise
"""


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if strange := [text for text in rest if text.startswith("-") or "=" not in text]:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    options.overrides += rest  # argparse stops collecting them at the first option
    try:
        with ended_by_sigterm(), in_file(options.config):
            options.command(options)
    except PrflError as error:
        who = f"prfl, process {os.environ['RANK']}" if "RANK" in os.environ else "prfl"
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prfl: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM (a cluster's way to end a job) as Ctrl-C, so that half-written files are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def in_file(path: str | Path | None) -> Iterator[None]:
    """Puts the config's file in front of a bare yaml path, as ``configs/x.yaml: reward.space``."""
    try:
        yield
    except PrflError as error:
        if path is None or error.where not in {key for key, _ in all_keys(Config)}:
            raise
        raise PrflError(error.what, where=f"{path}: {error.where}", fix=error.fix) from error


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    overview = f"Align a video generator with preferences, by the gradient of a latent reward.\n\n{TRAIN_EXAMPLES}"
    top = argparse.ArgumentParser(prog="prfl", description=overview, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], None], name: str, summary: str, examples: str, config: str | None):
        description = f"{summary[0].upper()}{summary[1:]}.\n\n{examples}"
        added = commands.add_parser(name, help=summary, description=description, formatter_class=raw)
        added.set_defaults(command=command)
        added.add_argument("config", metavar="CONFIG", nargs=config, help="a yaml file, for example configs/tiny.yaml")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change, as training.steps=10")
        return added

    options = add(train, "train", "train a reward or a video model", TRAIN_EXAMPLES, None)
    options.add_argument("--dry-run", action="store_true", help="check everything and print the resolved config")
    resume = "the newest checkpoint of the run folder (auto), a new start (none), or a checkpoint's folder"
    options.add_argument("--resume", default="auto", metavar="auto|none|PATH", help=f"{resume}; default: auto")

    add(cache, "cache", "encode clips and prompts once, before training", CACHE_EXAMPLES, None)

    options = add(evaluate, "eval", "measure a reward per noise level, on held-out clips", EVAL_EXAMPLES, "?")
    options.add_argument("--head", action="append", metavar="[NAME=]FOLDER", help="a saved reward; may be repeated")
    options.add_argument("--manifest", type=Path, metavar="FILE", help="labelled videos, all of them held out")

    options = add(sample, "sample", "draw videos with a trained model", SAMPLE_EXAMPLES, None)
    options.add_argument("--compare-base", action="store_true", help="draw each video with the untrained model too")
    return top


def train(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)
    if len(stages) > 1 and options.resume not in ("auto", "none"):
        fix = f"prfl train {stages[-1].path} --resume {options.resume}"
        raise PrflError(f"one checkpoint for {len(stages)} stages", where="--resume", fix=fix)
    if options.dry_run:
        for stage in stages:
            print(f"# {stage.path}\n{dump_resolved(stage.config)}")
    from prfl import commands, processes

    for stage in stages:
        with in_file(stage.path):
            commands.train(stage.config, dry_run=options.dry_run, resume=options.resume)
    processes.end()


def cache(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)
    from prfl import commands

    for stage in stages:
        with in_file(stage.path):
            commands.cache(stage.config)


def evaluate(options: argparse.Namespace) -> None:
    if options.config is None and options.head is None:
        raise PrflError("nothing to measure", where="prfl eval", fix="give a config, or --head FOLDER, or both")
    config = load_config(options.config, options.overrides) if options.config else None
    from prfl import commands

    heads = {name or "head": Path(folder) for name, _, folder in (text.rpartition("=") for text in options.head or [])}
    commands.evaluate(config, heads=heads or None, manifest=options.manifest)


def sample(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    from prfl import commands

    commands.sample(config, compare_base=options.compare_base)


if __name__ == "__main__":
    sys.exit(main())
