"""Several people's answers: the majority, how far they agree, and what is wrong with their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prfl import cli
from prfl.data.manifest import PreferencePair, read_manifest
from prfl.labels.merge import merge
from prfl.utils.errors import PrflError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def answers(path: Path, *rows: tuple[str, str, str, dict], **fields: object) -> Path:
    lines = [{"prompt": p, "a": f"{a}.mp4", "b": f"{b}.mp4", "preference": of, **fields} for p, a, b, of in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_most_decide_and_agreement_is_told(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Bo saw the first pair the other way round; Cy answered one pair, and without a name."""
    files = [
        answers(folder / "1.jsonl", ("x", "a", "b", {"m": "a"}), ("y", "c", "d", {"m": "tie"}), rater="ann"),
        answers(folder / "2.jsonl", ("x", "b", "a", {"m": "b"}), ("y", "c", "d", {"m": "b"}), rater="bo"),
        answers(folder / "cy.jsonl", ("x", "a", "b", {"m": "b", "t": "tie"}), both_bad=["t"]),
    ]
    assert cli.main(["labels", "merge", *map(str, files)]) == 0, capsys.readouterr().err
    sides = [(folder / f"{name}.mp4").resolve() for name in "abcd"]
    assert read_manifest(folder / "preferences.jsonl") == [
        PreferencePair("x", sides[0], sides[1], {"m": "a", "t": "tie"}),
        PreferencePair("y", sides[2], sides[3], {"m": "b"}),
    ]
    told = capsys.readouterr().out
    assert "ann and bo agree: m 0.50 of 2" in told and "ann and cy agree: m 0.00 of 1" in told
    assert "cy: 1 pairs, left 0% of 1 decided, 1 ties (1 of them both bad)" in told
    assert "0 of the pairs are held out: a reward" in told


def test_a_rater_counts_once_a_pair(folder: Path) -> None:
    """As the last file has it: somebody saved twice."""
    first = answers(folder / "1.jsonl", ("x", "a", "b", {"m": "a"}), ("x", "a", "c", {"m": "a"}), rater="ann")
    second = answers(folder / "2.jsonl", ("x", "a", "b", {"m": "b"}), rater="ann")
    told = merge([first, second], out=folder / "all.jsonl")
    rows = read_manifest(folder / "all.jsonl")
    assert [row.preference for row in rows if isinstance(row, PreferencePair)] == [{"m": "b"}, {"m": "a"}]
    assert "agree" not in told


def test_files_elsewhere_and_what_is_wrong_with_them(folder: Path) -> None:
    away = folder / "downloads"
    away.mkdir()
    file = answers(away / "1.jsonl", ("x", "a", "b", {"m": "a"}), rater="ann", split="train")
    with pytest.raises(PrflError, match="no such file: a.mp4"):
        merge([file])
    merge([file], root=folder)
    assert (folder / "preferences.jsonl").is_file()
    other = answers(away / "2.jsonl", ("x", "c", "d", {"m": "a"}), rater="bo", split="validation")
    with pytest.raises(PrflError, match="2.jsonl:1: this prompt is in split 'validation' here"):
        merge([file, other], root=folder)
    with pytest.raises(PrflError, match="2 files are wrong"):
        merge([away / "3.jsonl", away / "4.jsonl"])
    (folder / "videos.jsonl").write_text('{"prompt": "x", "video": "a.mp4", "label": {"m": 1}}\n')
    with pytest.raises(PrflError, match="labelled videos, not compared pairs"):
        merge([folder / "videos.jsonl"])
