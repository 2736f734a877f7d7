"""Folders of videos with texts beside them, projects, and public sets."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

from tests.faults.planting import fault

FOLDER = ("data.manifest=null", "data.folder=clips")


def texts(but: int | None = None) -> None:
    """Write a text beside each clip, one of them left out."""
    for number in range(4):
        if number != but:
            Path(f"clips/{number}.txt").write_text(f"a red circle {number}\n")


@fault("a video of a folder without a text", "clips/2.mp4: there is no text beside this video", "into 2.txt")
def _(bench):
    texts(but=2)
    return bench.cli("train", "sft.yaml", *FOLDER)


@fault(
    "a reward from a folder without labels", "data.folder: videos with texts have no labels", "prfl labels page clips"
)
def _(bench):
    texts()
    return bench.cli("train", "reward.yaml", *FOLDER)


@fault("videos that are not below data.root", "data.root: there is no such folder: disk", "paths are relative to")
def _(bench):
    return bench.cli("train", "sft.yaml", "data.root=disk")


@fault("no prompts for the rounds", "data.prompts.validation: evaluation.every needs", "videos of data.folder")
def _(bench):
    texts()
    return bench.cli("train", "sft.yaml", *FOLDER, "data.held_out=0", "data.prompts={}", "evaluation.every=1")


@fault("a project that is there", "there is a project.yaml already", "--out names another folder")
def _(bench):
    texts()
    Path("mine").mkdir()
    Path("mine/project.yaml").touch()
    return bench.cli("init", "clips", "--out", "mine")


@fault("a benchmark that nobody knows", "--benchmark: there is no benchmark 'videogen'", "known: videogen-rewardbench")
def _(bench):
    return bench.cli("eval", "--benchmark", "videogen", "--head", "heads/latent")


@fault(
    "a reward that has no dimension of the set", "the reward and the set share no dimension", "--dimensions light=look"
)
def _(bench):
    row = {"prompt": "a red circle", "a": "clips/0.mp4", "b": "clips/1.mp4", "preference": {"look": "a"}}
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n")
    return bench.cli("eval", "--benchmark", "pairs.jsonl", "--head", "heads/latent", "--model", str(bench.model))


@fault("a table without videos in it", "texts.parquet: no column of its 1 rows has videos", "prfl labels import")
def _(bench):
    parquet.write_table(pyarrow.table({"prompt": ["x"]}), "texts.parquet")
    return bench.cli("unpack", "texts.parquet", "out")


@fault("a clip size that is larger than the first", "data.buckets[0]: it is larger than data.frames", "put it there")
def _(bench):
    return bench.cli("train", "sft.yaml", "data.buckets=[{frames: 9, height: 64, width: 64}]")


@fault("a name of a length that there is not", "data.buckets[0]: should be one of 2s-16fps", "did you mean '4s-8fps'?")
def _(bench):
    return bench.cli("train", "sft.yaml", "data.buckets=[4s-8fp]")
