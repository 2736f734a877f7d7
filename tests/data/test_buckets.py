"""Clips of several sizes in one run: which size a video is read at, and that a batch has one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from prfl.data import buckets
from prfl.data.buckets import ClipSizes, best_size
from prfl.data.dataset import LatentDataset, PairDataset, load_dataset
from prfl.data.encoding import build_cache
from prfl.data.examples import draw_examples, examples
from prfl.data.headers import Header, read_header, typical
from prfl.data.manifest import LabelledVideo, PreferencePair, write_manifest
from prfl.data.video import read_video, write_video
from prfl.evaluation.reward_eval import held_out
from prfl.objective.sft import Sft
from prfl.utils.order import shuffled_alike
from prfl.utils.video_size import VideoSize
from tests.data.test_clips import texture
from tests.objective.parts import with_policy

WIDE, TALL, SHORT, SLOW = (
    VideoSize(81, 480, 832, 16),
    VideoSize(81, 832, 480, 16),
    VideoSize(33, 480, 832, 16),
    VideoSize(33, 480, 832, 8),
)
HEADERS = {
    "wide": (Header(720, 1280, 24, 6.0), WIDE), "tall": (Header(1280, 720, 24, 6.0), TALL),
    "short": (Header(720, 1280, 24, 3.0), SHORT), "slow": (Header(480, 720, 8, 4.1), SLOW),
    "too short": (Header(720, 1280, 24, 0.5), SHORT), "square and long": (Header(512, 512, 16, 9.0), WIDE),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_video_is_read_at_the_size_that_it_fills(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "known_header", lambda video: HEADERS[video.stem][0])
    assert best_size([Path(f"{name}.mp4")], [WIDE, TALL, SHORT, SLOW]) == HEADERS[name][1]


def test_what_is_compared_has_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "known_header", lambda video: HEADERS[video.stem][0])
    rows = [LabelledVideo(Path(f"{name}.mp4"), "x", {}) for name in ("wide", "short")]
    assert ClipSizes((WIDE, SHORT)).of_rows(rows) == [WIDE, SHORT]
    assert ClipSizes((WIDE, SHORT), by_prompt=True).of_rows(rows) == [SHORT, SHORT]


def test_headers_of_many_videos(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", texture(12, 16, 32, seed=0), 6)
    assert read_header(tmp_path / "a.mp4") == Header(16, 32, 6.0, 2.0)
    many = [Header(16, 32, 8.0, float(second)) for second in range(10)] + [Header(64, 32, 24.0, 20.0)]
    assert typical(many) == Header(16, 32, 8.0, 1.0)


def test_a_step_has_one_kind_and_an_epoch_every_item() -> None:
    kinds = [0, 1, 1, 0, 1, 0, 0]  # batches of 3: two of each kind, filled up
    steps = [shuffled_alike(range(3 * step, 3 * step + 3), kinds, 3, 5, "x") for step in range(8)]
    assert all(len({kinds[item] for item in step}) == 1 for step in steps)
    first, second = ([item for step in steps[start : start + 3] for item in step] for start in (0, 3))
    assert set(first) == set(second) == set(range(7)) and first != second
    assert Counter(first).most_common(1)[0][1] == 2, "the last batch of a kind is filled up"
    assert shuffled_alike([4, 5], kinds, 3, 5, "x") == steps[1][1:], "nothing is remembered"


BIG, SMALL = VideoSize(9, 16, 16, 8), VideoSize(5, 16, 24, 8)


def test_batches_of_two_sizes_train_and_are_measured(tmp_path: Path, tiny_backbone) -> None:
    """Five videos of two shapes: SFT's batches and a reward's pairs have one shape each; evaluation scores all."""
    shapes = [(12, 16, 16), (6, 16, 24), (12, 16, 16), (6, 16, 24), (12, 16, 16)]
    videos = [tmp_path / f"{number}.mp4" for number in range(5)]
    for number, (video, shape) in enumerate(zip(videos, shapes, strict=True)):
        write_video(video, texture(*shape, seed=number), 8)
    folder, manifest, sizes = tmp_path / "cache", tmp_path / "m.jsonl", ClipSizes((BIG, SMALL))

    write_manifest(
        manifest, [LabelledVideo(video, "a red circle", {"light": number % 2}) for number, video in enumerate(videos)]
    )
    report = build_cache(tiny_backbone, manifest, folder, sizes, progress=False)
    assert report.encoded == 5
    data = load_dataset(tiny_backbone, manifest, folder, sizes, batch=2)
    assert isinstance(data, LatentDataset)
    torch.testing.assert_close(data.get([1]).latents, tiny_backbone.encode(read_video(videos[1], SMALL)[None]))
    objective = Sft(with_policy(tiny_backbone), data, seed=0)
    seen = {tuple(objective.draw(step, [2 * step, 2 * step + 1]).clean.shape) for step in range(3)}
    assert {shape[2:] for shape in seen} == {(3, 4, 4), (2, 4, 6)}
    assert objective.accumulate(0, [0, 1])["loss"] > 0
    assert sorted(map(sorted, held_out(data).batches(2))) == [[0, 2], [1, 3], [4]]

    pairs = [
        PreferencePair(f"a {colour} circle", videos[a], videos[b], {"light": "a"})
        for colour, a, b in (("red", 0, 2), ("blue", 1, 3))
    ]
    write_manifest(manifest, pairs)
    assert build_cache(tiny_backbone, manifest, folder, sizes, progress=False).encoded == 0
    compared = load_dataset(tiny_backbone, manifest, folder, ClipSizes((BIG, SMALL), by_prompt=True), batch=1)
    assert isinstance(compared, PairDataset)
    pool = examples(compared, "bradley_terry", ["light"])
    drawn = [tuple(draw_examples(compared, pool, 0, [index]).latents.shape) for index in range(2)]
    assert {shape[2:] for shape in drawn} == {(3, 4, 4), (2, 4, 6)} and {shape[0] for shape in drawn} == {2}
