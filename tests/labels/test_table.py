"""Labels from a CSV: what comes out, and the file and line of everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prfl import cli
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.video import write_video
from prfl.labels.layout import Layout
from prfl.labels.table import import_table
from prfl.utils.errors import PrflError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_video(tmp_path / "clips" / f"{name}.mp4", torch.zeros(3, 2, 16, 16), 8)
    return tmp_path


def test_rated_videos(folder: Path, capsys: pytest.CaptureFixture) -> None:
    """As a spreadsheet of another country writes it: a mark in front, semicolons, Windows' line ends."""
    table = folder / "ratings.csv"
    lines = ["video;prompt;split;motion;text", 'clips/a.mp4;"a dog; it runs";train;5;1', "clips/b.mp4;a cat;;2;", ""]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert cli.main(["labels", "import", str(table), "--scale", "1:5"]) == 0, capsys.readouterr().err
    a, b = (folder / "clips" / name for name in ("a.mp4", "b.mp4"))
    assert read_manifest(folder / "ratings.jsonl") == [
        LabelledVideo(a.resolve(), "a dog; it runs", {"motion": 1.0, "text": 0.0}, "train"),
        LabelledVideo(b.resolve(), "a cat", {"motion": 0.25}),
    ]
    assert "2 videos of 2 prompts" in capsys.readouterr().out


def test_compared_pairs(folder: Path) -> None:
    table = folder / "pairs.csv"
    table.write_text('prompt,a,b,motion,text\n"a dog, running",clips/a.mp4,clips/b.mp4,A,tie\n\n')
    told = import_table(table, folder / "out.jsonl")
    sides = [(folder / "clips" / name).resolve() for name in ("a.mp4", "b.mp4")]
    assert read_manifest(folder / "out.jsonl") == [
        PreferencePair("a dog, running", *sides, {"motion": "a", "text": "tie"})
    ]
    assert "motion: a x 1" in told and "1 pairs of 1 prompts" in told


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the header has no column video and no prompt"),
        ("video,motion\n", 1, "the header has no column prompt"),
        ("prompt,a,motion\n", 1, "the header has no column b"),
        ("video,prompt\nclips/a.mp4,x\n", 1, "names no dimension"),
        ("video,prompt,motion,motion\n", 1, "the column 'motion' stands twice"),
        ("video,prompt,motion,\n", 1, "the column '' stands twice, or has no name"),
        ("prompt,a,b,video,motion\n", 1, "of a video and of a pair"),
        ("video,prompt,motion\n", None, "holds a header and no rows"),
        ("video,prompt,motion\nclips/a.mp4,a dog, runs,1\n", 2, "has 4 cells, the header has 3"),
        ("video,prompt,motion\nclips/a.mp4,x,1\nclips/b.mp4,y,good\n", 3, "'motion' is 'good', not a number"),
        ('video,prompt,motion\nclips/a.mp4,"two\nlines",1\nclips/b.mp4,y,7\n', 4, "'motion' is 7"),
        ("video,prompt,motion\nclips/a.mp4,x,nan\n", 2, "'motion' is nan"),
        ("video,prompt,motion\nclips/a.mp4,,1\n", 2, "'prompt'"),
        ("video,prompt,motion\nclips/z.mp4,x,1\n", 2, "no such file"),
        ("video,prompt,motion\n../z.mp4,x,1\n", 2, "leaves the manifest's folder"),
        ("video,prompt,split,motion\nclips/a.mp4,x,holdout,1\n", 2, "'split'"),
        ("video,prompt,motion\nclips/a.mp4,x,1\nclips/a.mp4,x,0\n", 3, "stand already at"),
        ("prompt,a,b,motion\nx,clips/a.mp4,clips/b.mp4,sideways\n", 2, "found 'sideways'"),
        ("prompt,a,b,motion\nx,clips/a.mp4,clips/b.mp4,\n", None, "nobody answered any of its 1 pairs"),
        ("prompt,a,b,motion\nx,clips/a.mp4,clips/a.mp4,a\n", 2, "both sides"),
        ('video,prompt,motion\nclips/a.mp4,"x,1\n', 2, "is not CSV"),
    ],
)
def test_what_is_wrong_and_in_which_line(folder: Path, text: str, line: int | None, message: str) -> None:
    table = folder / "labels.csv"
    table.write_text(text)
    with pytest.raises(PrflError) as caught:
        import_table(table, folder / "out.jsonl")
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{table}{'' if line is None else f':{line}'}: ")
    assert not (folder / "out.jsonl").exists(), "nothing is written"


def test_other_faults(folder: Path) -> None:
    table = folder / "labels.csv"
    table.write_bytes("video,prompt,motion\nclips/a.mp4,a caf\xe9,1\n".encode("latin-1"))
    with pytest.raises(PrflError, match="labels.csv:2: is not UTF-8"):
        import_table(table, folder / "out.jsonl")
    with pytest.raises(PrflError, match="no scale"):
        import_table(table, folder / "out.jsonl", Layout(scales={"": (1.0, 1.0)}))
    with pytest.raises(PrflError, match="there is no such file"):
        import_table(folder / "absent.csv", folder / "out.jsonl")


def test_rows_without_an_answer_are_counted_and_named(folder: Path) -> None:
    table = folder / "labels.csv"
    side = "clips/a.mp4,clips/b.mp4"
    table.write_text(f"prompt,a,b,motion,text\nx,{side},a,\ny,{side},,\nz,{side},,b\nu,{side}, ,\n")
    told = import_table(table, folder / "out.jsonl")
    assert [row.prompt for row in read_manifest(folder / "out.jsonl")] == ["x", "z"]
    assert "2 pairs of 2 prompts" in told and "2 pairs that nobody answered are left out: line 3, 5" in told
    table.write_text("video,prompt,motion\nclips/a.mp4,x,1\nclips/b.mp4,y,\n")
    told = import_table(table, folder / "out.jsonl")
    assert len(read_manifest(folder / "out.jsonl")) == 2 and "1 videos have no label: line 3" in told


def test_all_that_is_wrong_is_said_at_once(folder: Path) -> None:
    table = folder / "labels.csv"
    rows = ["clips/a.mp4,x,9", "clips/b.mp4,y", "clips/c.mp4,z,1", "clips/d.mp4,u,0", 'clips/a.mp4,"v,1']
    table.write_text("\n".join(["video,prompt,motion", *rows]) + "\n")
    with pytest.raises(PrflError, match="4 rows are wrong") as caught:
        import_table(table, folder / "out.jsonl")
    for line, what in ((2, "'motion' is 9"), (3, "has 2 cells"), (5, "no such file"), (6, "is not CSV")):
        assert f"{table}:{line}: {what}" in str(caught.value)
    assert f"{table}:4" not in str(caught.value)


def test_each_wrong_answer_of_a_row_and_both_missing_videos_are_said(folder: Path) -> None:
    """One fault more a run would be found only after the others are mended."""
    lines = ["prompt,a,b,motion,look", "a dog,a.mp4,b.mp4,sideways,up", "a cat,x.mp4,y.mp4,a,down"]
    (folder / "t.csv").write_text("\n".join(lines))
    with pytest.raises(PrflError, match="2 rows are wrong") as caught:
        import_table(folder / "t.csv")
    for message in ("csv:2: 'motion': found 'sideways'", "csv:2: 'look': found 'up'", "csv:3: 'look': found 'down'"):
        assert message in str(caught.value)
    assert "csv:3: no such file: x.mp4; no such file: y.mp4" in str(caught.value)
    (folder / "t.csv").write_text("\n".join(lines[:2]))
    with pytest.raises(PrflError, match="one of the rows is wrong in 2 ways"):
        import_table(folder / "t.csv")
