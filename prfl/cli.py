"""The command line: reads arguments, loads the config, calls prfl.commands.  No logic of its own.

prfl.commands is imported inside the commands, so that ``prfl --help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from prfl.cli_options import by_option, config_of, in_file, names, numbers, print_any_name, span
from prfl.config import Stage, dump_resolved, json_schema, load_config, load_stages
from prfl.errors import PrflError
from prfl.interrupts import ended_by_signals
from prfl.streams import lossy_output, silence
from prfl.text import visible

TRAIN_EXAMPLES = """\
  prfl train configs/tiny.yaml
      the whole story on the model inside the package: a reward head, then PRFL from it, then the report
  prfl train configs/wan2.1-14b/prfl.yaml --dry-run
      what a run would be: every setting, its work and its memory; needs no weights and no GPU
  prfl train configs/tiny/prfl.yaml training.steps=10 run=runs/try
      change keys of a config without editing it
  prfl train configs/tiny.yaml prfl.training.steps=10
      where a config has stages, the stage's name comes first
  torchrun --nproc_per_node 2 -m prfl.cli train CONFIG     (or: accelerate launch -m prfl.cli train CONFIG)
      several processes, one a GPU, share out training.batch, the cache and the evaluation: the same result
"""
TRAIN_TEACHES = f"""\
{TRAIN_EXAMPLES}
a config
  A yaml file with one section for each thing that a run is made of: backbone (the video model), data (clips, prompts,
  cache), reward (what is maximised), rollout (the sampling chain), objective (the method), training (optimizer and
  loop) and evaluation (what is watched).  Files to start from are in configs/.  A key that is missing, misspelt or read
  by nobody is an error that names it.  Every key is described in the file that `prfl schema` writes, which makes an
  editor complete and check keys; --dry-run prints a config with all its defaults.

key=value
  Changes one key of the config; the value is YAML:
      training.steps=10   backbone.adapter.rank=8   evaluation.every=0   reward.weights='{{motion: 1.0, quality: 0.5}}'
      objective.sft=null   backbone.adapter.targets='[to_q, to_v]'

resume
  A run that was stopped (Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save first) goes on from the newest checkpoint of its run
  folder when the same command is given again.  --resume none starts anew, --resume FOLDER takes a certain checkpoint.
  How long, how often and where (training.steps, log_every, save_every, run, evaluation) may change; anything else is
  refused.

dry run
  Validates the config and its prompts, builds the model without weights and prints the resolved config, tokens,
  trainable parameters, network evaluations, the predicted peak memory by part, and which inputs are not there yet.
  `prfl doctor CONFIG` says whether this machine can run it.
"""
DOCTOR_EXAMPLES = """\
  prfl doctor                                    this machine: versions, device, attention, kernels, disk, hub, video
  prfl doctor configs/wan2.1-1.3b/prfl.yaml      and whether a run of this config could work on it

The exit code is 2 when a run could not work; the reasons are listed last.
"""
SCHEMA_EXAMPLES = """\
  prfl schema prfl.schema.json

With the YAML extension of VS Code (and any editor that uses yaml-language-server), make this the first line of a
config, and keys are completed, explained and checked while you type:
  # yaml-language-server: $schema=prfl.schema.json
The path is relative to the config.
"""
CACHE_EXAMPLES = """\
  prfl cache configs/tiny/reward.yaml

A cache that was stopped goes on where it stopped.  Videos that cannot be read are listed at the end, with exit code 2
unless data.skip_unreadable is true.
"""
EVAL_EXAMPLES = """\
  prfl eval --run runs/tiny-reward                          a finished run: its reward by noise level
  prfl eval --run runs/tiny-prfl                            a finished run: its policy beside the base, test prompts
  prfl eval configs/tiny/reward.yaml                        the head that this config trained
  prfl eval --head runs/tiny-reward/reward                  a saved reward, on the clips that it was trained for
  prfl eval configs/tiny/reward.yaml --head frozen=FOLDER --head pixel=FOLDER
                                                            several, side by side
  prfl eval configs/tiny/reward.yaml --manifest FILE        on other labelled videos, out of domain say
"""
SAMPLE_EXAMPLES = """\
  prfl sample configs/tiny/prfl.yaml                  what this config trained
  prfl sample configs/tiny/prfl.yaml --compare-base   beside the untrained model, from the same noise
  prfl sample configs/tiny/reward.yaml --per-prompt 4 --prompts 20 --dimensions motion,text
                                                      four videos a prompt, and a page on which a person compares them
"""
SCORE_EXAMPLES = """\
  prfl score a.mp4 b.mp4 --prompt "a dog runs" --head runs/tiny-reward/reward
      on the standard output, as CSV
  prfl score manifest.jsonl --head owner/name --sigmas 0,0.5,0.9 --draws 4 --out scores.json
      every video of a manifest with its own prompt, at three noise levels, each the mean over four draws of the noise
  prfl score latents.safetensors --prompt "a dog runs" --head owner/name --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      normalised latents, (channels, frames, height, width), under the name 'latents'
"""
EXPORT_EXAMPLES = """\
  prfl export runs/tiny-prfl                        one LoRA file for diffusers and ComfyUI, and a model card
  prfl export runs/tiny-prfl --merged               the whole transformer too, as a diffusers folder
  prfl export runs/tiny-reward --push owner/name    a reward, uploaded to the Hugging Face hub
"""
BENCH_EXAMPLES = """\
  pytest --benchmark --benchmark-json=a.json             measure (bench/README.md): this writes the files
  prfl bench report a.json b.json --page report.html     tables here, and a page with plots
  prfl bench report --update README.md                   the tables between a README's bench comments, from their files
  prfl bench compare a.json b.json                       what became slower or larger from a to b
"""
LABELS_EXAMPLES = """\
  prfl labels import ratings.csv                    video,prompt,split,motion,text with numbers from 0 to 1
  prfl labels import ratings.csv --scale 1:5        ... or from 1 to 5
  prfl labels import pairs.csv --out pairs.jsonl    prompt,a,b,motion with a, b or tie

Paths in the file are relative to its folder.  Other columns than video, prompt, a, b and split are dimensions.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if strange := [text for text in rest if text.startswith("-") or "=" not in text]:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    if "overrides" not in options and rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = getattr(options, "overrides", []) + rest  # argparse stops at the first option
    print_any_name()
    with nullcontext() if prints_its_result(options) else lossy_output():
        return run(options)


def run(options: argparse.Namespace) -> int:
    """The exit code of the command."""
    try:
        with ended_by_signals(), in_file(config_of(options)):
            options.command(options)
            if sys.stdout:
                sys.stdout.flush()
    except PrflError as error:
        who = f"prfl, process {os.environ['RANK']}" if "RANK" in os.environ else "prfl"
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:  # of a file's name
        name, fix = str(error.object)[:200], "export PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        found = PrflError(f"the locale's encoding, {error.encoding}, cannot write this name", where=name, fix=fix)
        print(f"prfl: {found}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prfl: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the result has enough
        silence(sys.stdout)
        return 1
    except OSError as error:
        if not prints_its_result(options) or error.filename is not None:
            raise
        silence(sys.stdout)
        print(f"prfl: the standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def prints_its_result(options: argparse.Namespace) -> bool:
    """Whether the standard output is what the command is for; elsewhere it is told what goes on."""
    return options.command in (score, schema, doctor, bench_report, bench_compare) or getattr(options, "dry_run", False)


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    overview = f"Align a video generator with preferences, by the gradient of a latent reward.\n\n{TRAIN_EXAMPLES}"
    top = argparse.ArgumentParser(prog="prfl", description=overview, formatter_class=raw)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def plain(command: Callable[[argparse.Namespace], None], name: str, summary: str, examples: str, under=commands):
        description = f"{summary[0].upper()}{summary[1:]}.\n\n{examples}"
        added = under.add_parser(name, help=summary, description=description, formatter_class=raw)
        added.set_defaults(command=command, config=None)
        return added

    def add(command: Callable[[argparse.Namespace], None], name: str, summary: str, examples: str, config: str | None):
        added = plain(command, name, summary, examples)
        added.add_argument("config", metavar="CONFIG", nargs=config, help="a yaml file, for example configs/tiny.yaml")
        added.add_argument("overrides", metavar="key=value", nargs="*", help="keys to change, as training.steps=10")
        return added

    options = add(train, "train", "train a reward or a video model", TRAIN_TEACHES, None)
    options.add_argument("--dry-run", action="store_true", help="check everything; print settings, work and memory")
    resume = "the newest checkpoint of the run folder (auto), a new start (none), or a checkpoint's folder"
    options.add_argument("--resume", default="auto", metavar="auto|none|PATH", help=f"{resume}; default: auto")

    add(cache, "cache", "encode clips and prompts once, before training", CACHE_EXAMPLES, None)

    options = add(evaluate, "eval", "measure a reward per noise level, on held-out clips", EVAL_EXAMPLES, "?")
    options.add_argument("--run", type=Path, metavar="FOLDER", help="a finished run, in place of a config")
    options.add_argument("--head", action="append", metavar="[NAME=]FOLDER", help="a saved reward; may be repeated")
    options.add_argument("--manifest", type=Path, metavar="FILE", help="labelled videos, all of them held out")

    options = add(sample, "sample", "draw videos with a trained model", SAMPLE_EXAMPLES, None)
    options.add_argument("--compare-base", action="store_true", help="draw each video with the untrained model too")
    options.add_argument("--per-prompt", type=int, metavar="N", help="draw N videos a prompt, for a person to compare")
    options.add_argument("--prompts", type=int, metavar="N", help="of so many training prompts (with --per-prompt)")
    options.add_argument("--dimensions", type=names, metavar="A,B", help="what is asked of a pair (with --per-prompt)")

    options = plain(score, "score", "score videos or latents with a saved reward", SCORE_EXAMPLES)
    options.add_argument("inputs", nargs="+", metavar="FILE", help="videos, latents (.safetensors), manifests (.jsonl)")
    options.add_argument("--head", required=True, metavar="FOLDER", help="a saved reward: a folder or a hub id")
    options.add_argument("--prompt", help="the prompt of every FILE that is not a manifest")
    options.add_argument(
        "--sigmas", type=numbers, default=[0.0], metavar="S,S", help="noise levels, 0 clean to 1 noise"
    )
    options.add_argument("--draws", type=int, default=1, metavar="N", help="mean over N draws of the noise; default: 1")
    options.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    options.add_argument("--model", help="the video model: a folder or hub id; default: what the reward was trained on")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the video model's weights")
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU if any")
    options.add_argument("--follow-links", action="store_true", help="a manifest's links may lead out of its folder")
    options.add_argument("--out", type=Path, metavar="FILE", help=".csv or .json; default: CSV on the standard output")
    for name, kind in (("frames", int), ("height", int), ("width", int), ("fps", float)):
        options.add_argument(f"--{name}", type=kind, help="of the clip that is read; default: as the reward's training")

    options = plain(export, "export", "write what a run trained for others to load", EXPORT_EXAMPLES)
    options.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: RUN/export")
    options.add_argument("--name", help="of the file and of the card; default: the run folder's name")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the LoRA file")
    options.add_argument("--merged", action="store_true", help="write the merged transformer too")
    options.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the Hugging Face hub")
    options.add_argument("--private", action="store_true", help="make a new repository private (with --push)")

    about = "labels that people gave"
    under = commands.add_parser("labels", help=about, description=LABELS_EXAMPLES, formatter_class=raw)
    options = plain(
        import_labels, "import", "turn a CSV of labels into a manifest", LABELS_EXAMPLES,
        under.add_subparsers(required=True, metavar="ACTION"),
    )  # fmt: skip
    options.add_argument("file", type=Path, metavar="FILE.csv", help="one line a video, or a pair")
    options.add_argument("--out", type=Path, metavar="FILE", help="the manifest; default: FILE.jsonl")
    options.add_argument("--scale", type=span, default=(0.0, 1.0), metavar="LOW:HIGH", help="of ratings; default: 0:1")

    about = "show and compare the results of pytest --benchmark"
    under = commands.add_parser("bench", help=about, description=BENCH_EXAMPLES, formatter_class=raw)
    actions = under.add_subparsers(required=True, metavar="ACTION")
    options = plain(bench_report, "report", "show results as tables and as a page", BENCH_EXAMPLES, actions)
    options.add_argument("files", nargs="*", type=Path, metavar="FILE", help="of pytest-benchmark (--benchmark-json)")
    options.add_argument("--page", type=Path, metavar="FILE.html", help="write a self-contained page")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="write the plot of costs against size")
    options.add_argument("--markdown", action="store_true", help="print the table of a README instead")
    options.add_argument("--update", type=Path, metavar="README", help="write the tables of a README from their files")
    options = plain(bench_compare, "compare", "show what changed between two results", BENCH_EXAMPLES, actions)
    options.add_argument("before", type=Path, metavar="A")
    options.add_argument("after", type=Path, metavar="B")

    add(doctor, "doctor", "say whether this machine can run a config, or anything", DOCTOR_EXAMPLES, "?")

    options = plain(schema, "schema", "write the JSON schema of configs, for editors", SCHEMA_EXAMPLES)
    options.add_argument("file", metavar="FILE", nargs="?", type=Path, help="where to; default: the terminal")
    return top


def train(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)
    if len(stages) > 1 and options.resume not in ("auto", "none"):
        fix = f"prfl train {stages[-1].path} --resume {options.resume}"
        raise PrflError(f"one checkpoint for {len(stages)} stages", where="--resume", fix=fix)
    if options.dry_run:
        dry_run(stages)
        return
    from prfl import commands, processes

    for stage in stages:
        with in_file(stage.path):
            commands.train(stage.config, resume=options.resume)
    processes.end()


def dry_run(stages: Sequence[Stage]) -> None:
    for stage in stages:
        print(f"# {stage.path}\n{dump_resolved(stage.config)}", flush=True)
    from prfl import preflight

    for number, stage in enumerate(stages):
        with in_file(stage.path):
            preflight.dry_run(stage, earlier=stages[:number])


def doctor(options: argparse.Namespace) -> None:
    stages: Sequence[Stage] = load_stages(options.config, options.overrides) if options.config else ()
    from prfl import preflight

    preflight.doctor(stages)


def schema(options: argparse.Namespace) -> None:
    text = json.dumps(json_schema(), indent=2) + "\n"
    if options.file is None:
        print(text, end="")
    else:
        from prfl.data.files import replacing

        with replacing(options.file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def cache(options: argparse.Namespace) -> None:
    stages = load_stages(options.config, options.overrides)
    from prfl import commands

    for stage in stages:
        with in_file(stage.path):
            commands.cache(stage.config)


def evaluate(options: argparse.Namespace) -> None:
    if options.config and options.run:  # a run brings its config, so what stands there is a key to change
        if "=" not in options.config:
            raise PrflError("a config and a run are given", where="prfl eval", fix="give one of them")
        options.overrides.insert(0, options.config)
        options.config = None
    if options.config is None and options.head is None and options.run is None:
        raise PrflError("nothing to measure", where="prfl eval", fix="give --run FOLDER, a config, or --head FOLDER")
    config = load_config(options.config, options.overrides) if options.config else None
    from prfl import commands

    heads: dict[str, Path] = {}
    for text in options.head or []:
        name, _, folder = text.rpartition("=")
        name = name or (folder if len(options.head) > 1 else "head")
        if heads.setdefault(name, Path(folder)) != Path(folder):
            raise PrflError(f"two heads are called {name!r}", where="--head", fix="give each a name of its own")
    own = {} if config else {"run": options.run, "overrides": options.overrides}
    commands.evaluate(config, heads=heads or None, manifest=options.manifest, **own)


def sample(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.per_prompt is None:
        if options.prompts is not None or options.dimensions is not None:
            raise PrflError("they need --per-prompt", where="--prompts, --dimensions", fix="--per-prompt 4")
        from prfl import commands

        return commands.sample(config, compare_base=options.compare_base)
    if options.compare_base:
        raise PrflError("people compare the videos of one model", where="--compare-base", fix="leave it out")
    from prfl.labels.draw import draw

    draw(config, options.per_prompt, prompts=options.prompts, dimensions=options.dimensions)


def score(options: argparse.Namespace) -> None:
    from prfl.score import CLIP, score_files

    with by_option({"backbone.model": "--model", "backbone.dtype": "--dtype", "backbone.device": "--device"}):
        score_files(
            options.inputs,
            options.head,
            prompt=options.prompt,
            model=options.model,
            dtype=options.dtype,
            device=options.device,
            sigmas=options.sigmas,
            noise_draws=options.draws,
            seed=options.seed,
            clip={name: getattr(options, name) for name in CLIP},
            out=options.out,
            follow_links=options.follow_links,
        )


def export(options: argparse.Namespace) -> None:
    from prfl.export import export_run

    wanted = {name: getattr(options, name) for name in ("out", "name", "dtype", "merged", "push", "private")}
    print(visible(f"exported: {export_run(options.run, **wanted)}"))


def import_labels(options: argparse.Namespace) -> None:
    from prfl.labels.table import import_csv

    print(visible(import_csv(options.file, options.out or options.file.with_suffix(".jsonl"), options.scale)))


def bench_report(options: argparse.Namespace) -> None:
    if not options.files and not options.update:
        raise PrflError("no files", where="prfl bench report", fix="give results, or --update README.md")
    from prfl.benchmark import commands

    commands.report(
        options.files, page=options.page, plot=options.plot, as_markdown=options.markdown, readme=options.update
    )


def bench_compare(options: argparse.Namespace) -> None:
    from prfl.benchmark import commands

    commands.compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
