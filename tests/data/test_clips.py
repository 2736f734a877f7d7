"""Pairs from plain videos: what each degradation does, that no moment is in two splits, and what goes wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from prfl.data.clips import ALIKE, DIMENSION, ClipSettings, degrade, write_clips
from prfl.data.manifest import LabelledVideo, PreferencePair, read_manifest
from prfl.data.sources import find_videos
from prfl.data.video import read_video, write_video
from prfl.utils import rng
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.data.files_as_they_are import encode

PROMPTS = {"train": ["a wave", "a cloud", "the sea"], "validation": ["some smoke"], "test": ["a river"]}
SETTINGS = ClipSettings(frames=5, height=16, width=16, fps=8)


def texture(frames: int = 16, height: int = 24, width: int = 40, seed: int = 0) -> torch.Tensor:
    """Patches with soft edges that drift to the left over others that stand still; (3, f, h, w)."""
    noise = rng.normal((2, 3, 6, 12), seed, "texture", 0, [0])[0]
    back, front = torch.nn.functional.interpolate(noise, (height, 2 * width), mode="bilinear").mul(4).tanh()
    moved = [front[:, :, 2 * t : 2 * t + width] for t in range(min(frames, width // 2))]
    moved += moved[-1:] * (frames - len(moved))
    return torch.stack([0.4 * back[:, :, :width] + 0.6 * picture for picture in moved], dim=1)


def spoilt(kind: str, index: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    clip = texture(9, 32, 32, seed=index)
    return clip, degrade(clip, kind, rng.generator(0, kind, 0, index))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", DIMENSION)
def test_a_degradation_can_be_seen_stays_in_range_and_repeats(kind: str) -> None:
    for index in range(5):
        clip, bad = spoilt(kind, index)
        assert bad.shape == clip.shape and bad.abs().max() <= 1
        assert (bad - clip).abs().mean() > ALIKE
        assert torch.equal(bad, spoilt(kind, index)[1])


def test_what_each_degradation_does() -> None:
    def detail(pixels: torch.Tensor) -> float:
        return float(pixels.diff(dim=3).square().mean())

    clip, blurred = spoilt("blur")
    assert detail(blurred) < 0.9 * detail(clip)
    clip, noisy = spoilt("noise")
    assert 0.1 < float((noisy - clip).std()) < 0.5 and detail(noisy) > 2 * detail(clip)
    clip, flat = spoilt("contrast")
    assert 0.1 < float(flat.std() / clip.std()) < 0.6 and float((flat.mean() - clip.mean()).abs()) < 1e-5
    clip, shaken = spoilt("jitter")
    inner = clip[:, :, 8:-8, 8:-8]
    for frame in range(9):  # every frame is the clip's own, moved by up to an eighth
        errors = [
            float((shaken[:, frame, 8 + y : 24 + y, 8 + x : 24 + x] - inner[:, frame]).abs().max())
            for y in range(-4, 5)
            for x in range(-4, 5)
        ]
        assert min(errors) == 0
    clip, mixed = spoilt("shuffle")
    order = [next(s for s in range(9) if torch.equal(clip[:, s], mixed[:, t])) for t in range(9)]
    assert sorted(order) == list(range(9)) != order
    clip, frozen = spoilt("freeze")
    same = [torch.equal(frozen[:, t], frozen[:, t + 1]) for t in range(8)]
    assert same[-4:] == [True] * 4 and torch.equal(frozen[:, 0], clip[:, 0])


def test_splits_are_apart_in_time_and_every_pair_is_of_one_clip(tmp_path: Path) -> None:
    """The level of each frame tells when it was: no instant of the source is in two splits."""
    levels = 1.8 * torch.arange(40) / 40 - 0.9
    write_video(tmp_path / "in" / "x.mp4", levels[None, :, None, None].expand(3, 40, 16, 16), 8)
    pairs_file, clips_file = write_clips(tmp_path / "out", tmp_path / "in", PROMPTS, SETTINGS)
    clips, pairs = read_manifest(clips_file), read_manifest(pairs_file)
    when: dict[str | None, list[float]] = {"train": [], "validation": []}
    for row in clips:
        assert isinstance(row, LabelledVideo) and row.prompt in PROMPTS[row.split or ""]
        when[row.split] += read_video(row.video, VideoSize(5, 16, 16, 8)).mean((0, 2, 3)).tolist()
    assert len(clips) == 8 and len(when["validation"]) == 10  # a fifth of eight stretches, rounded
    assert max(when["train"]) < min(when["validation"])
    assert {row.prompt for row in clips} == {*PROMPTS["train"], *PROMPTS["validation"]}
    good = {row.video for row in clips if isinstance(row, LabelledVideo)}
    for row in pairs:
        assert isinstance(row, PreferencePair)
        ((dimension, side),) = row.preference.items()
        better, worse = (row.a, row.b) if side == "a" else (row.b, row.a)
        number, _, kind = worse.stem.partition("-")
        assert better in good and better.stem == number and DIMENSION[kind] == dimension  # type: ignore[index]
    sides = [next(iter(row.preference.values())) for row in pairs if isinstance(row, PreferencePair)]
    assert 0.2 < sides.count("a") / len(sides) < 0.8, "the side must not tell which is better"


def test_crops_formats_and_a_second_call(tmp_path: Path) -> None:
    write_video(tmp_path / "x.webm", texture(), 8)
    settings = ClipSettings(5, 16, 16, 8, kinds=("noise", "freeze"), crops=4, formats=("mp4", "gif"))
    pairs_file, clips_file = write_clips(tmp_path / "out", tmp_path / "x.webm", PROMPTS, settings)
    clips = [row.video for row in read_manifest(clips_file) if isinstance(row, LabelledVideo)]
    assert len(clips) == 12 and {video.suffix for video in clips} == {".mp4", ".gif"}
    for row in read_manifest(pairs_file):
        assert isinstance(row, PreferencePair) and row.a.suffix == row.b.suffix, "a codec must not tell the sides apart"
    crops = [read_video(video, VideoSize(5, 16, 16, 8)) for video in clips[:4]]
    whole = read_video(tmp_path / "x.webm", VideoSize(5, 16, 16, 8))
    # The first is the whole picture, resized twice; the others are parts of it, larger.
    assert (crops[0] - whole).abs().mean() < 0.08
    assert all((part - whole).abs().mean() > 0.12 for part in crops[1:])
    before = pairs_file.stat().st_mtime_ns
    assert write_clips(tmp_path / "out", tmp_path / "x.webm", PROMPTS, settings) == (pairs_file, clips_file)
    assert pairs_file.stat().st_mtime_ns == before


def test_what_cannot_be_seen_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    still = texture(1).expand(3, 16, 24, 40)
    write_video(tmp_path / "x.mp4", still, 8)
    pairs_file, _ = write_clips(tmp_path / "out", tmp_path / "x.mp4", PROMPTS, SETTINGS)
    dimensions = {name for row in read_manifest(pairs_file) for name in row.preference}  # type: ignore[union-attr]
    kinds = {row.a.stem.partition("-")[2] or row.b.stem.partition("-")[2] for row in read_manifest(pairs_file)}  # type: ignore[union-attr]
    assert kinds == {"blur", "noise", "contrast", "jitter"} and dimensions == {"look", "motion"}
    assert "3 clips, 12 pairs; too alike to see: 3 of shuffle, 3 of freeze" in capsys.readouterr().out
    settings = ClipSettings(5, 16, 16, 8, kinds=("shuffle", "freeze"))
    with pytest.raises(PrflError, match="every clip looks the same"):
        write_clips(tmp_path / "none", tmp_path / "x.mp4", PROMPTS, settings)
    assert not (tmp_path / "none" / "pairs.jsonl").exists()


def test_videos_that_are_not_there_or_too_short(tmp_path: Path) -> None:
    with pytest.raises(PrflError, match="no such file or folder"):
        find_videos(tmp_path / "absent")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no video")
    with pytest.raises(PrflError, match="holds no videos"):
        find_videos(tmp_path / "in")
    write_video(tmp_path / "in" / "below" / "x.gif", texture(6), 8)
    assert find_videos(tmp_path / "in").videos == [tmp_path / "in" / "below" / "x.gif"]
    with pytest.raises(PrflError, match="1 clips of 5 frames at 8 fps fit") as caught:
        write_clips(tmp_path / "out", tmp_path / "in", PROMPTS, SETTINGS)
    assert caught.value.where == "data.generator.videos"


def test_an_unreadable_video_ends_it_or_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_video(tmp_path / "in" / "a.mp4", texture(), 8)
    (tmp_path / "in" / "b.mp4").write_bytes(b"no video")
    write_video(tmp_path / "in" / "c.mp4", texture(seed=1), 8)
    with pytest.raises(PrflError, match="b.mp4: cannot be decoded"):
        write_clips(tmp_path / "out", tmp_path / "in", PROMPTS, SETTINGS)
    assert not (tmp_path / "out" / "pairs.jsonl").exists()
    _, clips_file = write_clips(tmp_path / "out", tmp_path / "in", PROMPTS, SETTINGS, skip_unreadable=True)
    assert "left out" in capsys.readouterr().out and len(read_manifest(clips_file)) == 6


def test_short_and_still_ones_are_left_out_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The rest of a file with a still in it is cut; its held-out clips are the last ones that move."""
    write_video(tmp_path / "in" / "long.mp4", texture(40), 8)
    write_video(tmp_path / "in" / "short.mp4", texture(4), 8)
    write_video(tmp_path / "in" / "._long.mp4", texture(40, seed=1), 8)
    levels = [np.full((16, 24, 3), 12 * index, np.uint8) for index in range(16)]
    times = [index / 8 for index in range(6)] + [2.25 + index / 8 for index in range(10)]
    encode(tmp_path / "in" / "still.mp4", levels, times=times)
    _, clips_file = write_clips(tmp_path / "out", tmp_path / "in", PROMPTS, SETTINGS)
    output = capsys.readouterr().out
    assert "left out: 1 hidden files (._long.mp4)" in output
    assert "left out: 1 shorter than 5 frames at 8 fps (short.mp4)" in output
    assert "left out: 2 stretches that stand still for more than half, in 1 videos (still.mp4)" in output
    rows = read_manifest(clips_file)
    assert len(rows) == 8 + 3 and [row.split for row in rows] == ["train"] * 9 + ["validation"] * 2


def test_damage_behind_the_first_clips_ends_it_or_leaves_the_rest_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    noise = rng.normal((3, 60, 32, 32), 0, "noise", 0, [0])[0].clamp(-1, 1)
    write_video(tmp_path / "x.mp4", noise, 8)
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"mdat") + len(data) * 3 // 4
    data[at : at + 6000] = bytes(6000)
    (tmp_path / "x.mp4").write_bytes(bytes(data))
    with pytest.raises(PrflError, match="x.mp4: (is damaged|cannot be decoded)"):
        write_clips(tmp_path / "none", tmp_path / "x.mp4", PROMPTS, SETTINGS)
    capsys.readouterr()
    _, clips_file = write_clips(tmp_path / "out", tmp_path / "x.mp4", PROMPTS, SETTINGS, skip_unreadable=True)
    rows = read_manifest(clips_file)
    assert "left out" in capsys.readouterr().out and 3 <= len(rows) < 12 and rows[-1].split == "validation"
