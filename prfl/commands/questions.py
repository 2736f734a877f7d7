"""``prfl questions``: write what a critic asks of each prompt's videos, and a page to read and mend it."""

from __future__ import annotations

import argparse
from pathlib import Path

from prfl.config import load_config

SUMMARY = "write the questions of a critic for a config's prompts"
EXAMPLES = """\
  prfl questions configs/wan2.1-1.3b/diffusion_drf.yaml
      three questions of each prompt from a template, into the file that reward.critic.questions names
  prfl questions CONFIG --model Qwen/Qwen3-4B-Instruct-2507 --page questions.html
      a chat model on this machine writes them; the page shows them, and saves what you mend
  prfl questions CONFIG --free --out data/answers.jsonl
      answers in words in place of yes or no

Prompts that have questions in the file already keep them.
"""
CONFIG = "one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines; default: reward.critic.questions")
    parser.add_argument("--free", action="store_true", help="answers in words in place of yes or no")
    parser.add_argument("--model", help="a chat model, folder or hub id, that writes them; default: a template")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU if any")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page to read and mend them in a browser")


def run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)

    from prfl.config.sections.backbone import BackboneConfig
    from prfl.factory.backbone import choose_device
    from prfl.labels.questions_page import write_page
    from prfl.reward.questions import read_questions
    from prfl.runs.questions import load_chat, write_for
    from prfl.utils.console import console, progress

    chat = None
    if options.model:
        chat = load_chat(options.model, choose_device(BackboneConfig(model="shapes", device=options.device)))
    path = write_for(config, options.out, free=options.free, chat=chat, progress=progress("writing questions"))
    questions = read_questions(path)
    console.say(f"{len(questions.by_prompt)} prompts, dimensions {', '.join(questions.dimensions[:12])}: {path}")
    if options.page:
        console.say(f"open in a browser: {write_page(options.page, questions, path.name)}")
