"""A folder of a.mp4 and a.txt: prompts, splits, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prfl.data.folder import prompt_beside, read_folder
from prfl.utils.errors import PrflError


def write(**texts: str | None) -> None:
    """Make videos (of any content) by name, with the text beside each; a name may have folders and a suffix."""
    for name, text in texts.items():
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".mp4").write_text(name)
        if text is not None:
            path.with_suffix(path.suffix or ".txt").write_text(text)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def prompts(held_out: float = 0.0) -> dict[str, list[tuple[str, str]]]:
    by_split: dict[str, list[tuple[str, str]]] = {}
    for row in read_folder(Path("in"), held_out):
        by_split.setdefault(row.split or "", []).append((row.video.relative_to("in").as_posix(), row.prompt))
    return by_split


def test_the_text_beside_a_video_is_its_prompt() -> None:
    write(
        **{"a": "a dog\nruns\n", "deep/b.caption": "a cat", "c.json": json.dumps({"caption": " a bird ", "tags": []})}
    )
    assert prompts() == {"train": [("a.mp4", "a dog runs"), ("c.mp4", "a bird"), ("deep/b.mp4", "a cat")]}
    assert prompt_beside(Path("in/none.mp4")) is None


def test_folders_at_the_top_are_splits() -> None:
    write(**{"train/a": "a", "val/b": "b", "test/c": "c", "x/test/d": "d", "e": "e"})
    found = prompts(held_out=0.5)
    assert found == {
        "test": [("test/c.mp4", "c")],
        "train": [("e.mp4", "e"), ("train/a.mp4", "a"), ("x/test/d.mp4", "d")],
        "validation": [("val/b.mp4", "b")],
    }


def test_a_share_of_the_prompts_is_held_out() -> None:
    write(**{f"{number}": f"prompt {number % 5}" for number in range(20)})
    found = prompts(held_out=0.2)
    assert len(found["validation"]) == 4 and len({prompt for _, prompt in found["validation"]}) == 1
    assert prompts(held_out=0.2) == found
    assert set(prompts(held_out=0.01)) == {"train", "validation"}, "at least one"
    assert set(prompts(held_out=0.0)) == {"train"}
    assert len({prompt for _, prompt in prompts(held_out=0.99)["train"]}) == 1, "and never all"


def test_every_video_without_a_prompt_is_named() -> None:
    write(**{"a": "a dog", "b": None, "c": "  ", "d.json": "[1]", "e.json": "{"})
    with pytest.raises(PrflError) as error:
        read_folder(Path("in"), 0.1)
    for text in (
        "4 captions are wrong",
        "in/b.mp4: there is no text",
        "b.txt",
        "in/c.txt: it is empty",
        "in/d.json: has no text",
        "in/e.json: is not JSON",
    ):
        assert text in str(error.value)
