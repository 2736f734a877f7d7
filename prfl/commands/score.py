"""``prfl score``: score videos or latents with a saved reward."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfl.commands.options import by_option, numbers
from prfl.utils.errors import PrflError

if TYPE_CHECKING:
    from prfl.runs.ranking import Ranking

SUMMARY = "score videos or latents with a saved reward"
EXAMPLES = """\
  prfl score a.mp4 b.mp4 --prompt "a dog runs" --head runs/tiny-reward/reward
      on the standard output, as CSV
  prfl score manifest.jsonl --head owner/name --sigmas 0,0.5,0.9 --draws 4 --out scores.json
      every video of a manifest with its own prompt, at three noise levels, each the mean over four draws of the noise
  prfl score latents.safetensors --prompt "a dog runs" --head owner/name --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      normalised latents, (channels, frames, height, width), under the name 'latents'
  prfl score clips/ --critic Qwen/Qwen3-VL-4B-Instruct --questions q.jsonl --frames 81 --height 480 --width 832 --fps 16
      a critic's answers about finished videos; it needs no video model
  prfl score clips/ --head owner/name --rank --best 3 --copy-to best/ --page best.html
      every video below clips/, with the prompt in the .txt beside it; the best three of each prompt, copied and shown
"""
PRINTS_RESULT = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs = "videos, latents (.safetensors), folders of them, patterns, manifests (.jsonl)"
    parser.add_argument("inputs", nargs="+", metavar="FILE", help=inputs)
    by = parser.add_mutually_exclusive_group(required=True)
    by.add_argument("--head", metavar="FOLDER", help="a saved reward: a folder or a hub id")
    by.add_argument("--critic", metavar="MODEL", help="a vision-language model, which answers questions instead")
    parser.add_argument("--questions", metavar="FILE", help="of the critic; default: whether it fits its prompt")
    parser.add_argument("--prompt", help="of files in no manifest that have no .txt beside them, as a.txt for a.mp4")
    parser.add_argument("--sigmas", type=numbers, default=[0.0], metavar="S,S", help="noise levels, 0 clean to 1 noise")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="mean over N draws of the noise; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: 0")
    parser.add_argument("--model", help="the video model: a folder or hub id; default: what the reward was trained on")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the video model's weights")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU if any")
    parser.add_argument("--follow-links", action="store_true", help="a manifest's links may lead out of its folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".csv or .json; default: CSV on the standard output")
    parser.add_argument("--rank", action="store_true", help="order the videos of each prompt, best first, as CSV")
    parser.add_argument("--best", type=int, metavar="N", help="only the best N of each prompt (implies --rank)")
    parser.add_argument("--copy-to", type=Path, metavar="FOLDER", help="copy the ranked files there (implies --rank)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page of the ranked videos (implies --rank)")
    for name, kind in (("frames", int), ("height", int), ("width", int), ("fps", float)):
        parser.add_argument(f"--{name}", type=kind, help="of the clip that is read; default: as the reward's training")


def run(options: argparse.Namespace) -> None:
    if options.best is not None and options.best < 1:
        raise PrflError(f"the best {options.best} are none", where="--best", fix="1 or more")

    from prfl.runs.ranking import Ranking
    from prfl.runs.score import CLIP, score_files

    clip = {name: getattr(options, name) for name in CLIP}
    ranks = options.rank or any((options.best, options.copy_to, options.page))
    ranking = Ranking(options.best, options.copy_to, options.page) if ranks else None
    if options.critic:
        return ask_critic(options, clip, ranking)
    if options.questions:
        raise PrflError("a saved reward is asked nothing", where="--questions", fix="--critic MODEL")
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
            clip=clip,
            out=options.out,
            follow_links=options.follow_links,
            ranking=ranking,
        )


def ask_critic(options: argparse.Namespace, clip: dict[str, Any], ranking: Ranking | None) -> None:
    """Score by a critic.  Raises PrflError for options of noisy latents, which it does not see."""
    from prfl.runs.score_critic import score_files

    if options.sigmas != [0.0] or options.draws != 1 or options.model:
        fix = "leave out --sigmas, --draws and --model"
        raise PrflError("a critic sees finished videos, without noise or a video model", where="--critic", fix=fix)
    score_files(
        options.inputs, options.critic, questions=options.questions, prompt=options.prompt, dtype=options.dtype,
        device=options.device, clip=clip, out=options.out, follow_links=options.follow_links, ranking=ranking,
    )  # fmt: skip
