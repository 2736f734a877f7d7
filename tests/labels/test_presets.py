"""The layouts of public sets and tools, each on an invented table; names of columns and words of answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from prfl import cli
from prfl.commands.labels import IMPORT_EXAMPLES
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.labels.answers import agreement, choice_of, compared, majority, number_of, rating_of
from prfl.labels.layout import Layout
from prfl.labels.presets import PRESETS
from prfl.labels.table import import_table
from prfl.utils.errors import PrflError
from tests.labels.layouts import LAYOUTS, table


def test_every_preset_has_an_invented_table_and_is_named_to_people() -> None:
    assert LAYOUTS.keys() == PRESETS.keys()
    for text in (IMPORT_EXAMPLES, Path("docs/data.md").read_text(encoding="utf-8")):
        assert PRESETS.keys() <= set(re.findall(r"[a-z][a-z0-9-]+", text))


def read_back(manifest: Path) -> list[tuple[str, tuple[str, ...], dict[str, Any], str | None]]:
    """Return prompt, videos (by their paths in the folder), answers and split of each row."""
    folder = manifest.parent.resolve()
    rows: list[tuple[str, tuple[str, ...], dict[str, Any], str | None]] = []
    for row in read_manifest(manifest):
        videos = [row.a, row.b] if isinstance(row, PreferencePair) else [row.video]
        answers: dict[str, Any] = dict(row.preference if isinstance(row, PreferencePair) else row.label)
        rows.append((row.prompt, tuple(str(video.relative_to(folder)) for video in videos), answers, row.split))
    return rows


@pytest.mark.parametrize("name", LAYOUTS)
def test_preset(name: str, tmp_path: Path) -> None:
    invented = LAYOUTS[name]
    path = invented.make(tmp_path)
    assert cli.main(["labels", "import", str(path), "--preset", name]) == 0
    rows = read_back(path.with_suffix(".jsonl"))
    assert [row[:3] for row in rows] == invented.expected
    assert {row[3] for row in rows} == {invented.split}


def test_raters_are_joined_and_their_agreement_is_told(tmp_path: Path) -> None:
    """Two of three say left; a pair that was shown the other way round is turned."""
    rows = [
        {"Rater": "x", "caption": "a dog", "left": "a.mp4", "right": "b.mp4", "motion": "left"},
        {"Rater": "y", "caption": "a dog", "left": "b.mp4", "right": "a.mp4", "motion": "RIGHT"},
        {"Rater": "z", "caption": "a dog", "left": "a.mp4", "right": "b.mp4", "motion": "2"},
    ]
    for video in "ab":
        (tmp_path / f"{video}.mp4").touch()
    told = import_table(table("votes.csv", *rows)(tmp_path))
    assert read_back(tmp_path / "votes.jsonl") == [("a dog", ("a.mp4", "b.mp4"), {"motion": "a"}, None)]
    assert "motion 0.33 of 3" in told


def test_ratings_of_several_raters_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    rows = [
        {"video": "a.mp4", "prompt": "a dog", "annotator": who, "motion": text}
        for who, text in (("x", "4,5"), ("y", "2"))
    ]
    import_table(table("ratings.csv", *rows)(tmp_path), layout=Layout(scales={"": (1.0, 5.0)}))
    (row,) = read_manifest(tmp_path / "ratings.jsonl")
    assert isinstance(row, LabelledVideo) and row.label == {"motion": pytest.approx((0.875 + 0.25) / 2)}


def test_columns_dimensions_and_another_folder(tmp_path: Path) -> None:
    """Paths made of columns, names given to answers, two scores compared, rows whose videos are not there."""
    videos = tmp_path / "disk"
    videos.mkdir()
    for name in ("1-a.mp4", "1-b.mp4"):
        (videos / name).touch()
    rows = [
        {"n": 1, "words": "a dog", "s1": "0,50", "s2": "0,53", "q": "yes", "fps": 8},
        {"n": 2, "words": "a cat", "s1": "0,9", "s2": "0,1", "q": "no", "fps": 8},
    ]
    path = table("votes.csv", *rows)(tmp_path)
    given = ["--columns", "a={n}-a.mp4,b={n}-b.mp4,prompt=words", "--dimensions", "motion=s1:s2", "--root", str(videos)]
    assert cli.main(["labels", "import", str(path), *given, "--margin", "0.05", "--skip-missing"]) == 0
    assert read_back(videos / "votes.jsonl") == [("a dog", ("1-a.mp4", "1-b.mp4"), {"motion": "tie"}, None)]
    assert cli.main(["labels", "import", str(path), *given, "--skip-missing"]) == 0
    assert read_back(videos / "votes.jsonl")[0][2] == {"motion": "b"}, "without a margin"


def test_what_is_missing_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"video": f"{n}.mp4", "prompt": str(n), "motion": 1} for n in range(3)]
    path = table("ratings.jsonl", *rows)(tmp_path)
    (tmp_path / "1.mp4").touch()
    assert cli.main(["labels", "import", str(path), "--out", str(tmp_path / "out.jsonl"), "--skip-missing"]) == 0
    assert "2 rows are left out, their videos are not there: 0.mp4, 2.mp4" in capsys.readouterr().out
    assert cli.main(["labels", "import", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "2 rows are wrong" in message and "0.mp4" in message and "2.mp4" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "videogen"], "there is no preset 'videogen'"),
        (["--columns", "c=x"], "'c' is nothing that a column holds"),
        (["--columns", "a=path_C"], "there is no column 'path_C'"),
        (["--columns", "a=v/{nr}.mp4"], "there is no column 'nr'"),
        (["--dimensions", "motion=m1:m2"], "there is no column 'm1'"),
        (["--ignore", "fps"], "there is no column 'fps'"),
        (["--scale", "look=1:5"], "there is no dimension 'look'"),
    ],
)
def test_what_the_table_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    path = table("t.csv", {"a": "a.mp4", "b": "b.mp4", "prompt": "x", "motion": "a"})(tmp_path)
    assert cli.main(["labels", "import", str(path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()


@pytest.mark.parametrize(
    ("word", "side"),
    [("A", "a"), ("Left", "a"), (1, "a"), ("Video 1 better", "a"), ("video 1 is better", "a"), ("video1", "a"),
     ("b", "b"), ("RIGHT", "b"), ("2", "b"), ("video_2", "b"), ("same", "tie"), ("Both", "tie"), ("equal", "tie"),
     ("bothbad_vote", "tie")],
)  # fmt: skip
def test_words_for_a_side(word: Any, side: str) -> None:
    assert choice_of("motion", word, "x") == side


@pytest.mark.parametrize("word", ["0", "3", "sideways", "video 3", "better", "ab"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(PrflError, match="no side of a pair"):
        choice_of("motion", word, "x")


def test_numbers() -> None:
    assert [number_of("x", value, "y") for value in ("1,5", "-0.5", 2, "Yes", "no", True)] == [1.5, -0.5, 2, 1, 0, 1]
    with pytest.raises(PrflError, match="not a number"):
        number_of("x", "1,234,567", "y")
    assert rating_of("x", 1, (4.0, 1.0), "y") == 1 and rating_of("x", 4, (4.0, 1.0), "y") == 0, "1 is the best"
    with pytest.raises(PrflError, match="'x' is 5"):
        rating_of("x", 5, (4.0, 1.0), "y")
    assert [compared(scores, 0.1) for scores in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.05))] == ["a", "b", "tie"]


def test_majority_and_agreement() -> None:
    assert majority(["a", "a", "b"]) == "a" and majority(["a", "b"]) == "tie"
    assert majority(["tie", "tie", "b"]) == "tie" and majority(["b", "tie"]) == "b"
    assert agreement([["a", "a", "b"], ["tie"]]) == (pytest.approx(1 / 3), 3)


def test_a_file_of_another_layout(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"win": "a.mp4"}, {"win": ["a.mp4"]}]))
    with pytest.raises(PrflError, match="2 rows are wrong") as caught:
        import_table(path, layout=PRESETS["solireward"])
    assert f"{path}: row 1: is not as this preset expects it" in str(caught.value)
    with pytest.raises(PrflError, match="'.doc' is no table"):
        import_table(tmp_path / "x.doc")
