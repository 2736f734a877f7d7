"""Prompts and labels."""

from __future__ import annotations

from pathlib import Path

from tests.faults.planting import fault


@fault("no prompts", "train.txt: holds no prompts", "one prompt on each line")
def _(bench):
    Path("train.txt").write_text("\n  \n")
    return bench.cli("train", "prfl.yaml")


@fault("an empty prompt", "manifest.jsonl:2: 'prompt'", "mend this row")
def _(bench):
    bench.rows(lambda rows: rows[1].update(prompt=" "))
    return bench.cli("train", "sft.yaml", "run=runs/new")


@fault("a prompt that stands twice", "train.txt:3", "stands already at train.txt:1", "remove one")
def _(bench):
    Path("train.txt").write_text("a red circle\na blue square\na red circle\n")
    return bench.cli("train", "prfl.yaml")


@fault("a prompt that is trained on and tested on", "data.prompts.test: the prompt 'a red circle' is in train too")
def _(bench):
    Path("test.txt").write_text("a red circle\n")
    return bench.cli("train", "prfl.yaml")


@fault("a label outside its range", "manifest.jsonl:3: 'label.light'", "less than or equal to 1", "found '7.0'")
def _(bench):
    bench.rows(lambda rows: rows[2]["label"].update(light=7.0))
    return bench.cli("train", "reward.yaml")


@fault("labels that are all of one kind", "reward.yaml: data.manifest", "'calm'", "all 1", "both good and bad")
def _(bench):
    bench.rows(lambda rows: [row["label"].update(calm=1.0) for row in rows])
    return bench.cli("train", "reward.yaml")


@fault("pairs that are all ties", "data.manifest", "'calm' with the loss bradley_terry", "all ties", "labels differ")
def _(bench):
    loss = "objective.loss=bradley_terry"
    bench.rows(lambda rows: [row["label"].update(calm=float(row["prompt"] == "a red circle")) for row in rows])
    return bench.cli("train", "reward.yaml", loss)


@fault("a label that nobody gave", "reward.head.dimensions", "no label 'calmness'", "did you mean 'calm'")
def _(bench):
    return bench.cli("train", "reward.yaml", "reward.head.dimensions=[calmness]")
