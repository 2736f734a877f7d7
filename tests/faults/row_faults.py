"""Several faults at once: all are reported, and one bad row does not stop the others."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.faults.planting import Bench, fault, warning

PAIRS = "prompt,a,b,calm\na red circle,clips/0.mp4,clips/1.mp4,{}\na blue square,clips/2.mp4,clips/3.mp4,{}\n"


def imported(bench: Bench, text: str) -> str:
    Path("labels.csv").write_text(text)
    return bench.cli("labels", "import", "labels.csv")


@fault(
    "a table with a header alone",
    "labels.csv: holds a header and no rows",
    "one line for each",
    leaves=("labels.",),
)
def _(bench):
    return imported(bench, "video,prompt,calm\n")


@fault("pairs that nobody answered", "labels.csv: nobody answered any of its 2 pairs", leaves=("labels.csv",))
def _(bench):
    return imported(bench, PAIRS.format("", ""))


@fault("two wrong rows of a table", "2 rows are wrong", "csv:2: 'calm': found", "csv:3: no", leaves=("labels.csv",))
def _(bench):
    return imported(bench, PAIRS.format("purple", "a").replace("3.mp4", "9.mp4"))


@fault("two wrong rows of a manifest", "2 rows are wrong", "manifest.jsonl:1: no such", "manifest.jsonl:2: 'label")
def _(bench):
    bench.rows(lambda rows: (rows[0].update(video="clips/9.mp4"), rows[1]["label"].update(calm=2.0)))
    return bench.cli("train", "reward.yaml")


@fault("two files that cannot be scored", "2 inputs are wrong", "absent.mp4: there is no", "'.txt' cannot be scored")
def _(bench):
    return bench.cli(
        "score", "absent.mp4", "a.txt", "clips/0.mp4", "--prompt", "a red circle", "--head", "heads/latent"
    )


def trained(bench: Bench) -> str:
    return bench.warned("train", "reward.yaml", "training.steps=1")


def held_out(bench: Bench, **changes: object) -> str:
    """The last two rows, of one prompt, are held out with these labels."""
    bench.rows(lambda rows: [row.update(split="train") for row in rows])
    bench.rows(lambda rows: [row.update(split="validation", label={"calm": 1.0, "light": 0.0}) for row in rows[2:]])
    bench.rows(lambda rows: (rows[0]["label"].update(calm=0.0), rows[3].update(**changes)))
    return trained(bench)


@warning("held-out labels that are all alike", "there is no accuracy for 'calm': all 1 held-out pairs of it are ties")
def _(bench):
    return held_out(bench)


@warning("held-out videos of different prompts", "no accuracy for 'calm': no two held-out videos of one prompt have a")
def _(bench):
    return held_out(bench, prompt="a green square")


@warning("no rows are held out", "no row has the split validation", "without an accuracy")
def _(bench):
    return trained(bench)


@fault("no two videos of one prompt to compare", "clips: 4 videos of 4 prompts, none of which has two", "word for word")
def _(bench):
    for number in range(4):
        Path(f"clips/{number}.txt").write_text(f"a red circle, take {number}")
    return bench.cli("labels", "page", "clips")


@fault("a labelling server at a port that is taken", "--port: cannot listen at 127.0.0.1, port", "--port 0 takes")
def _(bench):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = bench.cli("labels", "serve", "clips", "--prompt", "a red circle", "--port", port)
    return message.replace(port, "8765")


@fault("answers of two people in two splits", "bo.jsonl:1: this prompt is in split 'train' here", "the same split")
def _(bench):
    for rater, split in (("ann", "validation"), ("bo", "train")):
        row = {"prompt": "x", "a": "clips/0.mp4", "b": "clips/1.mp4", "preference": {"calm": "a"}, "split": split}
        Path(f"{rater}.jsonl").write_text(json.dumps(row) + "\n")
    return bench.cli("labels", "merge", "ann.jsonl", "bo.jsonl")
