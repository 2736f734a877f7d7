"""``prfl sample``: draw videos with a trained model, or with its base; choose among several while they are drawn."""

from __future__ import annotations

import argparse

from prfl.commands.options import numbers, questions
from prfl.config import Config, load_config
from prfl.config.sections.steering import BestOfConfig
from prfl.utils.errors import PrflError

SUMMARY = "draw videos with a model, and choose among them by a reward"
EXAMPLES = """\
  prfl sample configs/tiny/prfl.yaml                  what this config trained
  prfl sample configs/tiny/prfl.yaml --compare-base   beside the untrained model, from the same noise
  prfl sample configs/tiny/best.yaml --base --best-of 8 --decide-at 0.5
                                                      eight chains of the untrained model, the best one by half way
  prfl sample configs/tiny/best.yaml --best-of 16 --decide-at 0.4,0.7 --prompt "a red circle moves left quickly"
                                                      sixteen; four go on from the first look, one from the second
  prfl sample configs/tiny/reward.yaml --per-prompt 4 --prompts 20 --dimensions motion,text
                                                      four videos a prompt, and a page on which a person compares them
"""
CONFIG = "one"

STEERING = ("best_of", "method", "decide_at", "keep", "budget")  # options that steer
DRAWN = ("prompt", "seed", "base", "checkpoint", "lora_scale")  # what is drawn, steered or not


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="instead of the validation prompts; repeatable"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise; default: evaluation.seed")
    parser.add_argument("--base", action="store_true", help="draw with the untrained model")
    parser.add_argument("--checkpoint", metavar="NAME", help="of the run, as step-000050; default: its result")
    parser.add_argument("--lora-scale", type=float, metavar="X", help="factor of what the policy's adapter changes")
    parser.add_argument("--compare-base", action="store_true", help="draw each video with the untrained model too")

    steering = parser.add_argument_group("choosing while drawing (the rest of it: the config's `steering` section)")
    steering.add_argument("--best-of", type=int, metavar="N", help="draw N chains a video, and keep the best")
    steering.add_argument("--decide-at", type=numbers, metavar="S,S", help="shares of the steps; 1 is the end")
    steering.add_argument("--keep", type=int, metavar="K", help="finish K of them; default: 1")
    steering.add_argument("--method", metavar="NAME", help="another way to steer; default: best_of")
    steering.add_argument("--budget", type=float, metavar="CALLS", help="as many chains as so many network calls allow")

    labels = parser.add_argument_group("videos for a person to compare")
    labels.add_argument("--per-prompt", type=int, metavar="N", help="draw N videos a prompt, for a person to compare")
    labels.add_argument("--prompts", type=int, metavar="N", help="of so many training prompts (with --per-prompt)")
    asked = "what is asked of a pair, in words or not; repeatable (with --per-prompt)"
    labels.add_argument("--dimensions", type=questions, action="append", metavar="NAME=QUESTION", help=asked)


def run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    if options.per_prompt is not None:
        return draw_for_labels(config, options)
    if options.prompts is not None or options.dimensions is not None:
        raise PrflError("they need --per-prompt", where="--prompts, --dimensions", fix="--per-prompt 4")
    if changes := overrides(config, options):
        config = load_config(options.config, [*options.overrides, *changes])

    from prfl.runs.sample import sample
    from prfl.utils import processes

    sample(
        config,
        compare_base=options.compare_base,
        prompts=options.prompt or (),
        base=options.base,
        checkpoint=options.checkpoint,
        lora_scale=1.0 if options.lora_scale is None else options.lora_scale,
    )
    processes.end()


def overrides(config: Config, options: argparse.Namespace) -> list[str]:
    """The options as keys of the config; another method begins with its own defaults."""
    changes = [] if options.seed is None else [f"evaluation.seed={options.seed}"]
    if all(getattr(options, name) is None for name in STEERING):
        return changes
    name = options.method or (config.steering.name if config.steering else "best_of")
    if config.steering is None or config.steering.name != name:
        changes.append(f"steering={{name: {name}}}")
    keys = {"chains": options.best_of, "decide_at": options.decide_at, "keep": options.keep, "budget": options.budget}
    if options.best_of is None and options.budget is not None:
        keys["chains"] = BestOfConfig.model_fields["chains"].default  # a budget says how many, and not the config
    elif options.budget is None and options.best_of is not None:
        changes.append("steering.budget=null")
    return changes + [f"steering.{key}={value}" for key, value in keys.items() if value is not None]


def draw_for_labels(config: Config, options: argparse.Namespace) -> None:
    unused = [name for name in (*STEERING, *DRAWN, "compare_base") if getattr(options, name) not in (None, False)]
    if unused:
        where = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise PrflError("people compare the videos of one model, as they are drawn", where=where, fix="leave it out")

    from prfl.labels.draw import draw

    asked = {name: text for each in options.dimensions or () for name, text in each.items()}
    draw(config, options.per_prompt, prompts=options.prompts, questions=asked)
