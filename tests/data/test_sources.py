"""Which files of a folder are a user's videos, and that whatever else lies there is counted and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prfl.data.sources import Sources, find_videos, listed
from prfl.utils.errors import PrflError
from prfl.utils.files import CACHE_TAG, mark_written, written_by_prfl


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)


def names(sources: Sources) -> list[str]:
    return [path.relative_to("in").as_posix() for path in sources.videos]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_is_left_out_is_counted_and_named() -> None:
    touch(
        "in/a.mp4", "in/._a.mp4", "in/b.avi", "in/notes.txt", "in/x.mp4/b.MOV", "in/.trash/c.mp4", "in/deep/er/d.webm"
    )
    touch("in/made/e.mp4", "in/old/samples/step-1/videos/f.mp4", "in/old/metrics.jsonl", "in/run/samples/g.mp4")
    mark_written(Path("in/made"), CACHE_TAG)
    mark_written(Path("in/run/samples"))
    os.symlink("nowhere.mp4", "in/gone.mp4")
    os.symlink("a.mp4", "in/twin.mp4")
    os.symlink("made/e.mp4", "in/taken.mp4")
    os.symlink("..", "in/deep/circle")
    sources = find_videos(Path("in"))
    assert names(sources) == ["a.mp4", "deep/er/d.webm", "x.mp4/b.MOV"]
    assert [listed(reason, paths) for reason, paths in sorted(sources.left_out.items())] == [
        "1 copies of others (twin.mp4)",
        "3 files of other suffixes (b.avi, notes.txt, metrics.jsonl)",
        "3 folders that prfl wrote (made, samples, samples)",
        "1 folders with a video's suffix, of which the files in them are read (x.mp4)",
        "1 hidden files (._a.mp4)",
        "1 hidden folders (.trash)",
        "1 links to folders that are read anyway (circle)",
        "1 links to nothing (gone.mp4)",
        "1 links to what prfl wrote (taken.mp4)",
    ]


def test_a_cache_of_another_program_may_hold_videos() -> None:
    """The hub's cache has a CACHEDIR.TAG too."""
    touch("in/a.mp4")
    Path("in/CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# of somebody else\n")
    assert names(find_videos(Path("in"))) == ["a.mp4"]


@pytest.mark.parametrize("path", ["in/made", "in/made/deep", "in/made/deep/a.mp4"])
def test_what_prfl_wrote_is_no_source_by_any_name(path: str) -> None:
    touch("in/made/deep/a.mp4")
    mark_written(Path("in/made"), CACHE_TAG)
    assert written_by_prfl(Path("in/made"))
    with pytest.raises(PrflError, match="lies in .*in/made, which prfl wrote"):
        find_videos(Path(path))


def test_links_that_lead_out_are_followed_where_the_user_says_so() -> None:
    """A snapshot of the hub, whose files are links to blobs without a suffix, and a folder on another disk."""
    touch("hub/blobs/0123", "disk/far/b.mp4", "in/c.mp4")
    os.symlink("../hub/blobs/0123", "in/a.mp4")
    os.symlink("../disk", "in/disk")
    with pytest.raises(
        PrflError, match="(?s)2 links that lead out of the folder \\(disk, a.mp4\\).*follow_links=true"
    ) as e:
        find_videos(Path("in"))
    assert e.value.where == "in"
    left = find_videos(Path("in"), skip_unreadable=True)
    assert names(left) == ["c.mp4"] and list(left.left_out) == ["links that lead out of the folder"]
    assert names(find_videos(Path("in"), follow_links=True)) == ["a.mp4", "c.mp4", "disk/far/b.mp4"]


def test_a_folder_without_videos_says_what_it_holds() -> None:
    touch("in/._a.mp4", "in/b.avi")
    with pytest.raises(PrflError, match="holds no videos; 1 hidden files \\(._a.mp4\\); 1 files of other suffixes"):
        find_videos(Path("in"))
    assert listed("videos", [Path(f"{number}.mp4") for number in range(7)]).endswith("4.mp4 and 2 more)")
