"""``prfl eval``: measure a reward per noise level, or a policy beside its base."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from prfl.commands.labels import pairs_of
from prfl.commands.options import by_option, numbers
from prfl.config import load_config
from prfl.utils.errors import PrflError

NAME = "eval"
SUMMARY = "measure a reward per noise level, on held-out clips or a public set"
EXAMPLES = """\
  prfl eval --run runs/tiny-reward                          a finished run: its reward by noise level
  prfl eval --run runs/tiny-policy                          a finished run: its policy beside the base, test prompts
  prfl eval --run runs/tiny-reward --split test             the same on the rows that are for the end
  prfl eval configs/tiny/reward.yaml                        the head that this config trained
  prfl eval --head runs/tiny-reward/reward                  a saved reward, on the clips that it was trained for
  prfl eval configs/tiny/reward.yaml --head frozen=FOLDER --head pixel=FOLDER
                                                            several, side by side
  prfl eval configs/tiny/reward.yaml --manifest FILE        on other labelled videos, out of domain say
  prfl eval --benchmark videogen-rewardbench --root FOLDER --head owner/name
                                                            on a public set, which lies in FOLDER as it was downloaded
  prfl eval --benchmark pairs.jsonl --head FOLDER           the same on a manifest of one's own

benchmark
  Each video is read, encoded and scored once with its prompt; a command that was stopped goes on.  Printed are accuracy
  without ties and with ties (three classes, at the threshold that is best for the set, arXiv 2305.14324), by dimension
  and noise level, seconds and GiB a pair, and what others published; it is written to the card of the reward, as
  `datasets` and `model-index`.  A dimension of the set is compared with the reward's of the same name, and Overall with
  the sum of all; --dimensions quality=Overall,motion=MQ says otherwise.
"""
CONFIG = "optional"
CLIP = ("frames", "height", "width", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run, in place of a config")
    parser.add_argument("--head", action="append", metavar="[NAME=]FOLDER", help="a saved reward; may be repeated")
    parser.add_argument("--split", choices=("validation", "test"), help="of the config's clips; default: validation")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="labelled videos, all of them held out")

    parser.add_argument("--benchmark", metavar="NAME", help="videogen-rewardbench, or a manifest (.jsonl) of pairs")
    benchmark = parser.add_argument_group("with --benchmark")
    benchmark.add_argument("--root", type=Path, metavar="FOLDER", help="where the set's table and its videos are")
    benchmark.add_argument("--sigmas", type=numbers, metavar="S,S", help="noise levels; default: 0,0.5")
    benchmark.add_argument("--draws", type=int, metavar="N", help="mean over N draws of the noise; default: 1")
    benchmark.add_argument("--pairs", type=int, metavar="N", help="of no more rows, evenly over the set")
    benchmark.add_argument("--dimensions", type=pairs_of, metavar="HEAD=SET,...", help="which to compare with which")
    benchmark.add_argument("--model", help="the video model; default: what the reward was trained on")
    benchmark.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the video model's weights")
    benchmark.add_argument("--device", choices=["auto", "cpu", "cuda"], help="auto, the default, takes a GPU if any")
    benchmark.add_argument("--out", type=Path, metavar="FOLDER", help="of the scores; default: runs/benchmark-NAME")
    for name, kind in (("frames", int), ("height", int), ("width", int), ("fps", float)):
        benchmark.add_argument(f"--{name}", type=kind, help="of the clip that is read; default: as in the training")


OF_BENCHMARK = (
    "root", "sigmas", "draws", "pairs", "dimensions", "model", "dtype", "device", "out", "frames", "height", "width",
    "fps",
)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    if options.benchmark:
        run_benchmark(options)
        return
    if unread := [name for name in OF_BENCHMARK if getattr(options, name) is not None]:
        raise PrflError("only a benchmark has it", where=f"--{unread[0]}", fix="--benchmark NAME, or leave it out")
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


def run_benchmark(options: argparse.Namespace) -> None:
    """Measure saved rewards on a public set, or on a manifest."""
    for name in ("config", "run", "split", "manifest"):
        if getattr(options, name):
            raise PrflError("a benchmark is of saved rewards alone", where=f"{name}", fix="leave it out; --head FOLDER")
    if not options.head:
        raise PrflError("nothing to measure", where="--benchmark", fix="--head FOLDER, a saved reward or a hub id")

    from prfl.labels.benchmarks import benchmark_of
    from prfl.runs.benchmark import run_benchmark

    heads = {name: str(folder) for name, folder in named_heads(options.head).items()}
    asked = {
        "sigmas": options.sigmas, "noise_draws": options.draws, "most": options.pairs, "model": options.model,
        "dimensions": options.dimensions, "dtype": options.dtype, "device": options.device,
        "clip": {name: value for name in CLIP if (value := getattr(options, name)) is not None},
    }  # fmt: skip
    benchmark = benchmark_of(options.benchmark, options.root)
    benchmark = replace(benchmark, **{name: value for name, value in asked.items() if value is not None})
    with by_option({"backbone.model": "--model", "backbone.dtype": "--dtype", "backbone.device": "--device"}):
        run_benchmark(benchmark, heads, options.out or Path("runs") / f"benchmark-{benchmark.name}")


def named_heads(texts: list[str]) -> dict[str, Path]:
    """Return the folders of ``--head [NAME=]FOLDER`` by name.  Raises PrflError for two of one name."""
    heads: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.rpartition("=")
        name = name or (folder if len(texts) > 1 else "head")
        if heads.setdefault(name, Path(folder)) != Path(folder):
            raise PrflError(f"two heads are called {name!r}", where="--head", fix="give each a name of its own")
    return heads
