"""Videos inside a parquet file, or a data set of the hub, become files that the other commands read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from prfl import cli
from prfl.data.folder import read_folder
from prfl.data.manifest import read_manifest
from prfl.data.video import read_video, write_video
from prfl.labels.unpack import hub_rows, unpack, video_bytes
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.data.test_clips import texture


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def video(seed: int, suffix: str = "mp4") -> bytes:
    path = Path(f"made.{suffix}")
    write_video(path, texture(5, 16, 16, seed=seed), 8)
    return path.read_bytes()


def rows() -> list[dict]:
    return [
        {
            "prompt": text,
            "left": {"bytes": video(2 * number), "path": "x.mp4"},
            "right": {"bytes": video(2 * number + 1, "webm"), "path": None},
            "image": {"bytes": b"\xff\xd8picture", "path": "p.jpg"},
            "motion": vote,
        }
        for number, (text, vote) in enumerate([("a red circle", "left"), ("a blue square", "tie")])
    ]


def test_a_parquet_file_becomes_videos_texts_and_a_table(capsys: pytest.CaptureFixture) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows()), "train.parquet")
    assert cli.main(["unpack", "train.parquet", "out"]) == 0
    shown = capsys.readouterr().out
    assert "2 videos of column left, 2 videos of column right" in shown and "prfl init out/videos" in shown
    table = [json.loads(line) for line in Path("out/table.jsonl").read_text().splitlines()]
    assert table[1] == {
        "prompt": "a blue square",
        "left": "videos/000001-left.mp4",
        "right": "videos/000001-right.webm",
        "motion": "tie",
    }
    assert read_video("out/videos/000000-right.webm", VideoSize(5, 16, 16, 8)).shape == (3, 5, 16, 16)
    assert len(read_folder(Path("out/videos"), 0.0)) == 4
    assert cli.main(["labels", "import", "out/table.jsonl", "--out", "out/labels.jsonl"]) == 0
    assert [row.preference for row in read_manifest("out/labels.jsonl")] == [{"motion": "a"}, {"motion": "tie"}]
    with pytest.raises(PrflError, match="there is a table.jsonl already"):
        unpack("train.parquet", Path("out"))


def test_what_has_no_videos_is_refused() -> None:
    Path("torn.parquet").write_bytes(b"PAR1")
    Path("empty").mkdir()
    parquet.write_table(pyarrow.table({"prompt": ["x"]}), "texts.parquet")
    for source, words in {
        "torn.parquet": "is not a parquet file",
        "empty": "holds no parquet file",
        "texts.parquet": "no column of its 1 rows has videos",
        "nowhere.parquet": "no such file, and it is no data set of the hub",
    }.items():
        with pytest.raises(PrflError, match=words):
            unpack(source, Path("out"))


def test_a_data_set_of_the_hub_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of the package: what it is asked for, and what is made of what it gives."""
    asked: list[object] = []

    class Video(SimpleNamespace): ...

    class Stream(list):
        features = {"prompt": None, "left": Video(), "right": Video()}

        def cast_column(self, column: str, feature: Video) -> Stream:
            asked.append((column, feature.decode))
            return self

    def load_dataset(*names: str | None, **options: object) -> Stream:
        asked.append((names, options))
        return Stream(given)

    hub = ModuleType("datasets")
    hub.Video, hub.Image, hub.exceptions = Video, bytes, SimpleNamespace(DatasetsError=OSError)  # type: ignore[attr-defined]
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    Path("far.mp4").write_bytes(video(7))
    given = rows()
    given[0]["left"] = {"bytes": None, "path": "far.mp4"}
    unpack("owner/name:part", Path("out"), split="dev", most=1)
    assert asked == [(("owner/name", "part"), {"split": "dev", "streaming": True}), ("left", False), ("right", False)]
    assert Path("out/videos/000000-left.mp4").read_bytes() == Path("far.mp4").read_bytes()
    assert len(Path("out/table.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_real_package_reads_a_set_of_its_own() -> None:
    """A set in a folder of this name, which it looks for before it asks the hub; two columns are declared as videos."""
    datasets = pytest.importorskip("datasets", reason="pip install -e '.[hub-data]'")
    for name in ("left.mp4", "right.mp4"):
        Path(name).write_bytes(video(len(name)))
    cells = {"prompt": ["a dog"], "left": ["left.mp4"], "right": ["right.mp4"], "vote": ["left"]}
    kinds = {name: datasets.Video(decode=False) for name in ("left", "right")}
    features = datasets.Features({**kinds, **{name: datasets.Value("string") for name in ("prompt", "vote")}})
    Path("owner/name").mkdir(parents=True)
    datasets.Dataset.from_dict(cells, features=features).to_parquet("owner/name/train.parquet")
    (row,) = hub_rows("owner/name", "train")
    assert (row["prompt"], row["vote"]) == ("a dog", "left")
    assert [video_bytes(row[name]) for name in ("left", "right")] == [video(8), video(9)]
    with pytest.raises(PrflError, match="owner/name: cannot be read: Bad split"):
        list(hub_rows("owner/name", "dev"))
