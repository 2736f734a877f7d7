"""Which pairs are asked: every two videos of a prompt, the prompts in turn, some held out from the start."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from prfl.data.manifest import LabelledVideo, PreferencePair
from prfl.labels.asking import asked_of
from prfl.labels.pairs import Pair, all_pairs, spread, with_splits

HERE = Path("/clips")


def rows(prompts: int, videos: int, split: str | None = None) -> list[LabelledVideo]:
    return [
        LabelledVideo(HERE / f"{p}-{v}.mp4", f"prompt {p}", {}, split) for p in range(prompts) for v in range(videos)
    ]


def test_every_two_videos_of_a_prompt_once_and_always_the_same() -> None:
    pairs = all_pairs(HERE, rows(2, 3))
    assert [pair.prompt for pair in pairs] == ["prompt 0"] * 3 + ["prompt 1"] * 3
    assert len({frozenset((pair.a, pair.b)) for pair in pairs}) == 6
    assert all(pair in pairs for pair in all_pairs(HERE, rows(1, 2))), "an answer stays with its pair"
    answered = [PreferencePair("p", HERE / "x.mp4", HERE / "y.mp4", {"motion": "a"}, "test")]
    assert all_pairs(HERE, answered) == [Pair("p", "x.mp4", "y.mp4", "test")], "other people may answer them too"


def test_no_side_is_first_more_often() -> None:
    first = sum(pair.a.endswith("-0.mp4") for pair in all_pairs(HERE, rows(200, 2)))
    assert 70 < first < 130


@pytest.mark.parametrize("prompts", [2, 3, 12, 100])
def test_some_prompts_are_held_out(prompts: int) -> None:
    pairs = with_splits(all_pairs(HERE, rows(prompts, 2)))
    held = {pair.prompt for pair in pairs if pair.split == "validation"}
    assert len(held) == max(1, round(0.2 * prompts))
    more = with_splits(all_pairs(HERE, rows(prompts, 3)))
    assert held == {pair.prompt for pair in more if pair.split == "validation"}, "whatever videos come"


def test_splits_that_were_given_stay_and_one_prompt_is_trained_on() -> None:
    given = all_pairs(HERE, rows(3, 2, "train"))
    assert with_splits(given) == given
    assert {pair.split for pair in with_splits(all_pairs(HERE, rows(1, 3)))} == {"train"}


def test_folders_are_splits_and_what_is_in_none_is_held_out_in_part(tmp_path: Path) -> None:
    """A prompt's videos are compared within a split."""
    for name in [*(f"{prompt}-{number}" for prompt in range(5) for number in range(2)), *(f"test/{n}" for n in "abc")]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.mp4").touch()
        (tmp_path / f"{name}.txt").write_text(f"prompt {name.split('-')[0] if '-' in name else 0}")
    asked = asked_of(tmp_path, {}).pairs
    assert Counter(pair.split for pair in asked) == {"test": 3, "train": 4, "validation": 1}
    assert {pair.a.startswith("test/") == (pair.split == "test") for pair in asked} == {True}

    given = [Pair("x", "a", "b"), Pair("y", "c", "d", "train")]
    assert with_splits(given) == given, "beside rows for training, one without a split is for training"


def test_who_stops_early_has_covered_the_prompts_and_held_some_out() -> None:
    pairs = spread(with_splits(all_pairs(HERE, rows(20, 4))))
    assert len(pairs) == 120 and len(set(pairs)) == 120
    held = sum(pair.split == "validation" for pair in pairs) / len(pairs)
    for count in (5, 10, 30, 60):
        first = pairs[:count]
        assert abs(sum(pair.split == "validation" for pair in first) - held * count) <= 1
        assert len({pair.prompt for pair in first}) >= min(count, 20) - 1


def test_what_a_head_is_unsure_of_comes_first_but_not_among_the_held_out() -> None:
    pairs = with_splits(all_pairs(HERE, rows(20, 3)))
    unsure = {f"{pair.a} {pair.b}": float(number) for number, pair in enumerate(pairs)}
    chosen = spread(pairs, unsure)
    of = {split: [pair for pair in chosen if pair.split == split] for split in ("train", "validation")}
    order = [unsure[f"{pair.a} {pair.b}"] for pair in of["train"]]
    assert order == sorted(order, reverse=True)
    assert of["validation"] == [pair for pair in spread(pairs) if pair.split == "validation"]
