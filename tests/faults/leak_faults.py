"""Leaks: videos and prompts that are both trained on and held out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.faults.planting import Bench, fault, warning


def held_out_row(bench: Bench, **changes: object) -> None:
    bench.rows(lambda rows: rows[3].update(split="validation", **changes))
    bench.rows(lambda rows: [row.setdefault("split", "train") for row in rows])


def cached(bench: Bench, text: str) -> str:
    Path("test.txt").write_text(text + "\n")
    return bench.warned("cache", "prfl.yaml")


@fault("a video in two splits", "1 videos are in two splits: 3.mp4 (validation) is 0.mp4 (train)", "one split")
def _(bench):
    shutil.copy("clips/0.mp4", "clips/3.mp4")
    held_out_row(bench, prompt="a green square")
    return bench.cli("train", "reward.yaml")


@fault("one video as both sides of a pair", "1 pairs have the same video on both sides: 0.mp4 and 9.mp4", "leave these")
def _(bench):
    shutil.copy("clips/0.mp4", "clips/9.mp4")
    row = {"prompt": "a red circle", "a": "clips/0.mp4", "b": "clips/9.mp4", "preference": {"calm": "a"}}
    Path("manifest.jsonl").write_text(json.dumps(row) + "\n")
    return bench.cli("train", "reward.yaml", "reward.head.dimensions=[calm]", "objective.loss=bradley_terry")


@warning("prompts of unknown words in two sets", "1 prompts are, token for token, in another split", "'a wolf' (test)")
def _(bench):
    Path("train.txt").write_text("a red circle\na bear\n")
    return cached(bench, "a wolf")


@fault("prompts of two sets that are cut alike", "token for token", "only the first 512 tokens count")
def _(bench):
    Path("train.txt").write_text("red " * 600 + "circle\n")
    Path("test.txt").write_text("red " * 600 + "square\n")
    return bench.cli("train", "prfl.yaml")


@fault("a prompt held out with other spaces", "'a red\\xa0\\xa0circle' (test) and 'a red circle' (train)")
def _(bench):
    Path("test.txt").write_text("a red\xa0\xa0circle\n")
    return bench.cli("train", "prfl.yaml")


@fault("a manifest's prompt held out in words alike", "jsonl: 1 prompts are, token for token", "'a green circle'")
def _(bench):
    held_out_row(bench, prompt="a  green circle")
    bench.rows(lambda rows: rows[2].update(prompt="a green circle"))
    Path("validation.txt").write_text("a green square\n")
    return bench.cli("train", "reward.yaml")


@warning("a prompt held out with a capital and a full stop", "1 prompts differ", "in case", "'A red circle.' (test)")
def _(bench):
    return cached(bench, "A red circle.")


@warning("a training row whose prompt is held out in capitals", "manifest.jsonl: 1 prompts differ", "'a red circle'")
def _(bench):
    Path("train.txt").write_text("a blue square\n")
    Path("test.txt").write_text("a RED circle\n")
    return bench.warned("train", "sft.yaml", "run=runs/new", "training.steps=1")


@warning("prompts that are cut", "1 of 4 prompts are cut behind 512 tokens", "the longest has 601")
def _(bench):
    return cached(bench, "red " * 600)


@warning("words that the tokenizer does not know", "1 of 4 prompts have words that the tokenizer does not know", "wolf")
def _(bench):
    return cached(bench, "a red wolf")


@warning("training prompts that are one to the model", "1 of 3 prompts of train are, token for token, another one")
def _(bench):
    Path("train.txt").write_text("a wolf\na bear\na red circle\n")
    return bench.warned("cache", "prfl.yaml")


@warning("an evaluation on what was trained on", "other.jsonl: 4 videos and 2 prompts are among those of the training")
def _(bench):
    assert "among those of the training" not in bench.warned("train", "reward.yaml", "training.steps=1")
    shutil.copy("manifest.jsonl", "other.jsonl")
    return bench.warned("eval", "reward.yaml", "--manifest", "other.jsonl")
