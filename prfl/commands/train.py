"""``prfl train``: train a reward or a video model, stage by stage; ``--dry-run`` says what that would be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from prfl.commands.options import in_file
from prfl.config import Stage, dump_resolved, load_stages
from prfl.utils.errors import PrflError

SUMMARY = "train a reward or a video model"
EXAMPLES = """\
  prfl train configs/tiny.yaml
      the whole story on the model inside the package: a reward head, PRFL, then the report
  prfl train configs/wan2.1-14b/prfl.yaml --dry-run --gpu 80
      what a run would be: its memory and its hours, and what to change until it fits; needs no weights and no GPU
  prfl train configs/tiny/prfl.yaml training.steps=10 run=runs/try
      change keys of a config without editing it
  prfl train configs/tiny.yaml policy.training.steps=10
      where a config has stages, the stage's name comes first
  torchrun --nproc_per_node 2 -m prfl.cli train CONFIG     (or: accelerate launch -m prfl.cli train CONFIG)
      several processes, one a GPU, share out training.batch, the cache and the evaluation: the same result
"""
HELP = f"""\
{EXAMPLES}
a config
  A yaml file with one section for each thing that a run is made of: backbone (the video model), data (clips, prompts,
  cache), reward (what is maximised), rollout (the sampling chain), objective (the method), training (optimizer and
  loop) and evaluation (what is watched).  Files to start from are in configs/.  A key that is missing, misspelt or read
  by nobody is an error that names it.  Every key is described in the file that `prfl schema` writes, which makes an
  editor complete and check keys; --dry-run -v prints a config with all its defaults.

extends
  `extends: prfl.yaml` in a config takes over the sections of another one in the same folder, but for its run folder.
  What the config gives itself goes before it, key by key; a section that names another kind (objective.name,
  reward.space) is replaced as a whole, and so are lists.

key=value
  Changes one key of the config; the value is YAML:
      training.steps=10   backbone.adapter.rank=8   evaluation.every=0   reward.weights='{{motion: 1.0, quality: 0.5}}'
      objective.sft=null   backbone.adapter.targets='[to_q, to_v]'

resume
  A run that was stopped (Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save first) goes on from the newest checkpoint of its run
  folder when the same command is given again.  --resume none starts anew: what lies in the run folder is put aside in
  earlier-STEP-... below it, and nothing is deleted.  --resume FOLDER takes a certain checkpoint.
  How long, how often and where (training.steps, log_every, save_every, run, evaluation) may change; anything else is
  refused.

dry run
  Validates the config and its prompts, builds the model without weights and prints tokens, trainable parameters, the
  predicted peak memory by part, network evaluations with their hours on a GPU, and which inputs are not there yet; with
  -q the two tables of memory and cost alone, with -v the resolved config too.  Hours are calculated from what is
  counted, not measured.  --gpu 24, 48, 80 or 141 says whether the run fits a card of so many gigabytes, and else which
  keys to change, in which order, until it does: first what takes longer, then another method, then a smaller video.
  `prfl doctor CONFIG` says whether this machine can run it.
"""
CONFIG = "one"
GOES_ON = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    resume = "the run folder's newest checkpoint (auto), a new start beside what lies there (none), or a checkpoint"
    parser.add_argument("--dry-run", action="store_true", help="check everything; print memory and cost; no run")
    parser.add_argument("--gpu", type=int, choices=(24, 48, 80, 141), help="with --dry-run: does it fit so many GB")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("-q", "--quiet", action="store_true", help="with --dry-run: memory and cost alone")
    amount.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: the resolved config too")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help=f"{resume}; default: auto")


def run(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)
    if len(stages) > 1 and options.resume not in ("auto", "none"):
        fix = f"prfl train {stages[-1].path} --resume {options.resume}"
        raise PrflError(f"one checkpoint for {len(stages)} stages", where="--resume", fix=fix)
    if options.dry_run:
        dry_run(stages, options)
        return
    for name in ("gpu", "quiet", "verbose"):
        if getattr(options, name):
            raise PrflError("only a dry run has it", where=f"--{name}", fix=f"--dry-run --{name}, or leave it out")

    from prfl.runs import stage as run_stage
    from prfl.utils import processes

    for stage in stages:
        with in_file(stage.path):
            run_stage.train(stage.config, resume=options.resume)
    processes.end()


def dry_run(stages: Sequence[Stage], options: argparse.Namespace) -> None:
    for stage in stages if options.verbose else ():
        print(f"# {stage.path}\n{dump_resolved(stage.config)}", flush=True)

    from prfl.runs.dry_run import dry_run as show_stage

    for number, stage in enumerate(stages):
        with in_file(stage.path):
            show_stage(stage, earlier=stages[:number], gpu=options.gpu, quiet=options.quiet)
