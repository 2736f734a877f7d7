"""``prfl convert``: a published reward as a folder that a config can name."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfl.commands.options import add_command
from prfl.utils.errors import PrflError
from prfl.utils.text import visible

SUMMARY = "turn a published reward into a folder that a config can name"
EXAMPLES = """\
  prfl convert videoalign VideoReward --template VideoAlign/prompt_template.py --out data/videoalign
                                                    VideoReward: the downloaded folder of KwaiVGI/VideoReward
  prfl convert hpsv3 HPSv3.safetensors --template hpsv3/dataset/data_collator_qwen.py --out data/hpsv3

Done once.  Of a pickle only the tensors are read, and of the authors' source only the text that the reward is asked
with: no code of either is run.
"""
BASES = {"videoalign": "Qwen/Qwen2-VL-2B-Instruct", "hpsv3": "Qwen/Qwen2-VL-7B-Instruct"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="REWARD", dest="reward")
    for name, base in BASES.items():
        action = add_command(actions, name, f"{name}, for reward.{name}.model", EXAMPLES)
        action.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what its authors publish")
        action.add_argument("--template", type=Path, required=True, metavar="FILE", help="their source with the text")
        action.add_argument("--base", default=base, metavar="MODEL", help=f"its base, for config and words: {base}")
        action.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the folder that is written")


def run(options: argparse.Namespace) -> None:
    from prfl.reward.qwen_convert import convert_hpsv3, convert_videoalign

    if options.out.exists():
        raise PrflError("is there already", where=str(options.out), fix="give --out another name, or remove it")
    convert = convert_videoalign if options.reward == "videoalign" else convert_hpsv3
    convert(options.checkpoint, options.base, options.template, options.out)
    print(visible(f"converted: {options.out}; name it as reward.{options.reward}.model"))
