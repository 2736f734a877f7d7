from __future__ import annotations

import json
import os

import pytest

from prfl.config.sections.data import DataConfig
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest, write_manifest
from prfl.data.prompts import plain, read_prompts, split_prompts
from prfl.factory.prompts import load_prompts
from prfl.utils.errors import PrflError


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "set"
    (inner / "clips").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4"):
        (inner / "clips" / name).write_bytes(b"x")
    (tmp_path / "outside.mp4").write_bytes(b"x")
    os.symlink(tmp_path / "outside.mp4", inner / "clips" / "link.mp4")
    return inner


def write(folder, *lines: str | dict | bytes):
    raw = [x if isinstance(x, bytes) else (json.dumps(x) if isinstance(x, dict) else x).encode() for x in lines]
    (folder / "m.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return folder / "m.jsonl"


VIDEO = {"video": "clips/a.mp4", "prompt": "a dog", "label": {"motion": 1}}
PAIR = {"prompt": "a dog", "a": "clips/a.mp4", "b": "clips/b.mp4", "preference": {"motion": "a"}}


def test_videos_and_pairs_round_trip(folder):
    a, b = (folder / "clips" / name for name in ("a.mp4", "b.mp4"))
    videos = [LabelledVideo(a, "a dög", {"motion": 0.25, "text": 1.0}, "train"), LabelledVideo(b, "a cat", {})]
    pairs = [PreferencePair("a dog", a, b, {"motion": "tie", "text": "b"}, "test")] * 2
    for rows in (videos, pairs):
        write_manifest(folder / "m.jsonl", rows)
        assert read_manifest(folder / "m.jsonl") == rows
    assert sorted(p.name for p in folder.iterdir()) == ["clips", "m.jsonl"]  # no temporary file stays


def test_blank_lines_and_byte_order_mark_are_harmless(folder):
    path = write(folder, b"\xef\xbb\xbf" + json.dumps(VIDEO).encode(), "", "  ")
    assert len(read_manifest(path)) == 1


FAULTS = {
    "broken json": ('{"video": ', "is not JSON"),
    "absurd nesting": ("[" * 100_000, "is not JSON"),
    "not an object": ("[1]", "not an object"),
    "a key twice": ('{"video": "clips/a.mp4", "video": "clips/b.mp4", "prompt": "x"}', "'video' stands twice"),
    "not utf-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "unknown key": ({**VIDEO, "lable": {}}, "did you mean 'label'"),
    "missing key": ({"prompt": "x"}, "'video' is missing"),
    "missing file": ({**VIDEO, "video": "clips/c.mp4"}, "no such file"),
    "a folder": ({**VIDEO, "video": "clips"}, "no such file"),
    "label above 1": ({**VIDEO, "label": {"motion": 1.5}}, "label.motion"),
    "label below 0": ({**VIDEO, "label": {"motion": -1}}, "label.motion"),
    "label nan": ('{"video": "clips/a.mp4", "prompt": "x", "label": {"motion": NaN}}', "finite"),
    "label true": ({**VIDEO, "label": {"motion": True}}, "valid number"),
    "label text": ({**VIDEO, "label": {"motion": "1"}}, "valid number"),
    "empty prompt": ({**VIDEO, "prompt": " "}, "'prompt'"),
    "unknown split": ({**VIDEO, "split": "valid"}, "'split'"),
    "leaves the folder": ({**VIDEO, "video": "../outside.mp4"}, "leaves the manifest's folder"),
    "absolute": ({**VIDEO, "video": "/etc/passwd"}, "leaves the manifest's folder"),
    "link outside": ({**VIDEO, "video": "clips/link.mp4"}, "leaves the manifest's folder"),
    "null byte": ({**VIDEO, "video": "a\0.mp4"}, "cannot be a file name"),
    "long name": ({**VIDEO, "video": "a" * 5000}, "cannot be a file name"),
    "pair among videos": (PAIR, "is a pair, but the first row is a video"),
    "same row": (VIDEO, "stand already at"),
    "prompt in two splits": ({**VIDEO, "video": "clips/b.mp4", "split": "test"}, "in split 'test' here"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_names_file_and_line(folder, name):
    row, message = FAULTS[name]
    path = write(folder, VIDEO, "", row)
    with pytest.raises(PrflError) as caught:
        read_manifest(path)
    assert message in str(caught.value)
    assert caught.value.where == f"{path}:3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIR, "preference": {"motion": "c"}}, "preference.motion"),
        ({**PAIR, "preference": {}}, "'preference'"),
        ({**PAIR, "b": "clips/../clips/a.mp4"}, "both sides"),
        ({**PAIR, "label": {}}, "unknown key 'label'"),
        (VIDEO, "is a video, but the first row is a pair"),
    ],
)
def test_fault_in_a_pair(folder, row, message):
    with pytest.raises(PrflError, match="m.jsonl:2") as caught:
        read_manifest(write(folder, PAIR, row))
    assert message in str(caught.value)


def test_no_rows_and_no_file(folder):
    with pytest.raises(PrflError, match="holds no rows"):
        read_manifest(write(folder))
    with pytest.raises(PrflError, match="nowhere.jsonl: there is no such file"):
        read_manifest(folder / "nowhere.jsonl")


def test_write_refuses_a_path_outside(folder):
    with pytest.raises(PrflError, match="outside the manifest's folder"):
        write_manifest(folder / "m.jsonl", [LabelledVideo(folder.parent / "outside.mp4", "x", {})])
    assert not (folder / "m.jsonl").exists()


def test_a_full_disk_leaves_the_old_file(folder, monkeypatch):
    rows = [LabelledVideo(folder / "clips" / "a.mp4", "x", {})]
    write_manifest(folder / "m.jsonl", rows)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PrflError, match="No space left"):
        write_manifest(folder / "m.jsonl", [*rows, LabelledVideo(folder / "clips" / "b.mp4", "y", {})])
    assert read_manifest(folder / "m.jsonl") == rows
    assert sorted(p.name for p in folder.iterdir()) == ["clips", "m.jsonl"]


def test_read_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("a dog\r\n\n  # one hash is no comment \nzwei Vögel")
    assert read_prompts(tmp_path / "p.txt") == ["a dog", "# one hash is no comment", "zwei Vögel"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog"}\n{"prompt": "a cat"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "a\nb\na\n", "p.txt:3: the prompt 'a' stands already at"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "p.jsonl:2"),
        ("p.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', "p.jsonl:2"),
        ("p.csv", "a\n", "neither .txt nor .jsonl"),
    ],
)
def test_prompt_faults(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PrflError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_split_covers_everything_once_and_ignores_order():
    prompts = [f"prompt {i}" for i in range(50)]
    split = split_prompts(prompts)
    assert {name: len(part) for name, part in split.items()} == {"train": 40, "validation": 5, "test": 5}
    assert sorted(sum(split.values(), [])) == sorted(prompts)
    backwards = split_prompts(prompts[::-1])
    assert {name: set(part) for name, part in split.items()} == {name: set(part) for name, part in backwards.items()}
    two = split_prompts(prompts, ["train", "validation"])
    assert {name: len(part) for name, part in two.items()} == {"train": 44, "validation": 6}
    assert split_prompts(prompts, ["test"]) == {"test": prompts}


def test_a_set_that_would_be_empty_is_named():
    with pytest.raises(PrflError, match="3 prompts, split among train, validation, test, leave test empty"):
        split_prompts(["a", "b", "c"])


def data(manifest=None, **prompts) -> DataConfig:
    return DataConfig(manifest=manifest, prompts=prompts, cache="cache", frames=5, height=16, width=16, fps=8)


def test_sets_that_no_file_has_are_those_of_the_manifest(folder):
    rows = [{**VIDEO, "prompt": split, "split": split} for split in ("test", "train", "validation")]
    path = write(folder, *rows)
    assert load_prompts(data(path)) == {split: [split] for split in ("train", "validation", "test")}
    (folder / "x.txt").write_text("x")
    assert load_prompts(data(path, train=str(folder / "x.txt")))["train"] == ["x"]
    (folder / "x.txt").write_text("test")
    with pytest.raises(PrflError, match="data.prompts.test: the prompt 'test' is in train too"):
        load_prompts(data(path, train=str(folder / "x.txt")))
    with pytest.raises(PrflError, match="data.prompts.train: there are no prompts to train on"):
        load_prompts(data(write(folder, rows[0])))
    with pytest.raises(PrflError, match="2 rows are wrong"):
        load_prompts(data(write(folder, {**VIDEO, "lable": {}}, {"prompt": "x"})))


def test_one_file_for_all_sets_is_split(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(20)))
    other = tmp_path / "test.txt"
    other.write_text("another\n")
    sets = load_prompts(data(train=str(path), validation=str(path), test=str(path)))
    assert {name: len(prompts) for name, prompts in sets.items()} == {"train": 16, "validation": 2, "test": 2}
    sets = load_prompts(data(train=str(path), validation=str(path), test=str(other)))
    assert {name: len(prompts) for name, prompts in sets.items()} == {"train": 18, "validation": 2, "test": 1}
    assert len(load_prompts(data(train=str(path)))["train"]) == 20


def test_prompts_that_differ_only_in_how_they_are_written_are_split_together():
    prompts = [f"{number} dogs run" for number in range(40)]
    variants = ["{} Dogs run", "{} dogs  run.", "{} \uff44ogs run", "{} dogs\u00a0run", "{} do\u00adgs run"]
    other = [variants[number % 5].format(number) for number in range(40)]
    assert [plain(prompt) for prompt in other] == prompts
    before, split = split_prompts(prompts), split_prompts(prompts + other)
    assert sum(map(len, split.values())) == 80
    for chosen in split.values():
        assert {plain(prompt) for prompt in chosen} & set(prompts) == {p for p in chosen if p in prompts}
    assert before == split_prompts(prompts), "and nothing moves where nothing is alike"


def test_videos_may_be_below_another_folder(folder):
    """On another disk, say: nothing but what is below that folder is read."""
    path = write(folder.parent, VIDEO)
    (row,) = read_manifest(path, root=folder)
    assert row.video == folder / "clips/a.mp4"
    write_manifest(path, [row], root=folder)
    assert json.loads(path.read_text())["video"] == "clips/a.mp4"
    with pytest.raises(PrflError, match="leaves data.root"):
        read_manifest(write(folder.parent, {**VIDEO, "video": "../outside.mp4"}), root=folder)
    with pytest.raises(PrflError, match="no such folder"):
        read_manifest(path, root=folder / "elsewhere")


def test_links_lead_out_where_the_user_says_so(folder):
    """As in a snapshot of the hub; the path keeps the name, since a blob has no suffix.  ``..`` never leads out."""
    os.rename(folder.parent / "outside.mp4", folder.parent / "blob")
    os.remove(folder / "clips" / "link.mp4")
    os.symlink("../../blob", folder / "clips" / "link.mp4")
    os.symlink("link.mp4", folder / "clips" / "again.mp4")
    path = folder / "m.jsonl"
    path.write_text(json.dumps({**VIDEO, "video": "clips/link.mp4"}))
    with pytest.raises(PrflError, match="leaves the manifest's folder by a link") as caught:
        read_manifest(path)
    assert "data.follow_links=true" in caught.value.fix and "--follow-links" in caught.value.fix
    (row,) = read_manifest(path, follow_links=True)
    assert row.video == folder.resolve() / "clips" / "link.mp4"
    path.write_text(json.dumps({**PAIR, "a": "clips/link.mp4", "b": "clips/again.mp4"}))
    with pytest.raises(PrflError, match="both sides"):
        read_manifest(path, follow_links=True)
    path.write_text(json.dumps({**VIDEO, "video": "../blob"}))
    with pytest.raises(PrflError, match="leaves the manifest's folder\n"):
        read_manifest(path, follow_links=True)
