from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

from prfl.data import video
from prfl.data.video import cut_video, find_stretches, read_video, write_video
from prfl.toy import renderer
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.data.files_as_they_are import cut_by_edit_list, encode, patch

SIZE = VideoSize(17, 32, 32, 8)


def disc(frames: int = 17, height: int = 32, width: int = 32) -> torch.Tensor:
    """An orange disc that moves one pixel a frame to the right on grey; (3, f, h, w)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    colour = torch.tensor([0.9, 0.1, -0.8])[:, None, None]
    return torch.stack([((x - 8 - t) ** 2 + (y - 12) ** 2 < 30) * colour for t in range(frames)], dim=1)


def steps(frames: int, fps: float, path, size: int = 16) -> None:
    """Frame i is uniform grey of level i / frames: the level of a read frame tells which one it was."""
    levels = torch.arange(frames) / frames
    write_video(path, levels[None, :, None, None].expand(3, frames, size, size), fps)


def which(pixels: torch.Tensor, frames: int) -> list[int]:
    return (pixels.mean(dim=(0, 2, 3)) * frames).round().int().tolist()


@pytest.mark.parametrize(("suffix", "worst", "mean"), [("mp4", 0.08, 0.01), ("webm", 1.0, 0.04), ("gif", 0.02, 0.01)])
def test_round_trip_stays_close(tmp_path, suffix, worst, mean):
    path = tmp_path / "new" / f"x.{suffix}"
    write_video(path, disc(), 8)
    read = read_video(path, SIZE)
    assert read.shape == (3, 17, 32, 32) and read.dtype == torch.float32
    error = (read - disc()).abs()
    assert error.max() < worst and error.mean() < mean, (error.max(), error.mean())
    assert [p.name for p in path.parent.iterdir()] == [f"x.{suffix}"]


def test_a_small_video_is_written_alike_in_every_process(tmp_path, monkeypatch):
    """As x264 writes it without any assembly: with all of it, one in seven processes wrote another file."""
    captions = ["a cyan circle moves down quickly", "a red bar moves up slowly", "a yellow circle moves up quickly"]
    clip = renderer.render(renderer.sample_scenes(0, 0, 2, captions, 0.2, 0.3))[1]
    write_video(tmp_path / "as-shipped.mp4", clip, 8)
    codec, colours, options = video._CODEC[".mp4"]
    monkeypatch.setitem(video._CODEC, ".mp4", (codec, colours, {**options, "x264-params": "asm=0"}))
    write_video(tmp_path / "no-assembly.mp4", clip, 8)
    pictures = [read_video(path, VideoSize(17, 32, 32, 8.0)) for path in sorted(tmp_path.glob("*.mp4"))]
    assert torch.equal(*pictures)


def test_gif_keeps_a_busy_picture(tmp_path):
    """The palette is made for the clip: a smooth gradient survives 256 colours."""
    ramp = torch.linspace(-1, 1, 32)
    pixels = torch.stack([ramp[:, None].expand(32, 32), ramp.expand(32, 32), torch.zeros(32, 32)])
    pixels = torch.stack([pixels.roll(t, 1) for t in range(5)], dim=1)
    write_video(tmp_path / "x.gif", pixels, 8)
    read = read_video(tmp_path / "x.gif", VideoSize(5, 32, 32, 8))
    assert (read - pixels).abs().mean() < 0.06


def test_values_beyond_the_range_are_clamped(tmp_path):
    write_video(tmp_path / "x.mp4", disc() * 5, 8)
    assert (read_video(tmp_path / "x.mp4", SIZE) - (disc() * 5).clamp(-1, 1)).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_frames_are_taken_by_time_not_by_number(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    steps(30, 24, path)
    clip = dict(height=16, width=16)
    assert which(read_video(path, VideoSize(frames=5, fps=8, **clip)), 30) == [0, 3, 6, 9, 12]
    assert which(read_video(path, VideoSize(frames=5, fps=24, **clip)), 30) == [0, 1, 2, 3, 4]
    assert which(read_video(path, VideoSize(frames=5, fps=10, **clip)), 30) in (
        [0, 2, 5, 7, 10],
        [0, 2, 4, 7, 9],
        [0, 2, 5, 7, 9],
    )
    steps(31, 24, path)
    assert which(read_video(path, VideoSize(frames=5, fps=8, **clip), window="centre"), 31) == [9, 12, 15, 18, 21]
    assert which(read_video(path, VideoSize(frames=31, fps=24, **clip), window="centre"), 31) == list(range(31))


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_a_video_is_cut_into_clips_that_follow_each_other(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    steps(31, 24, path)
    assert find_stretches(path, frames=3, fps=8) == find_stretches(path, frames=10, fps=24) == ([0, 1, 2], 0, None)
    clips = list(cut_video(path, [0, 1, 2], VideoSize(3, 16, 16, 8)))
    assert [which(clip, 31) for clip in clips] == [[0, 3, 6], [9, 12, 15], [18, 21, 24]]
    assert torch.equal(clips[0], read_video(path, VideoSize(3, 16, 16, 8)))
    (last,) = cut_video(path, [2], VideoSize(3, 16, 16, 8))
    assert torch.equal(last, clips[2]), "a stretch before it may be left out"
    assert (
        find_stretches(path, frames=31, fps=24).numbers == [0] and not find_stretches(path, frames=32, fps=24).numbers
    )


def test_cutting_names_a_damaged_file(tmp_path):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"no video")
    for read in (find_stretches, lambda *a, **k: next(cut_video(*a, [0], VideoSize(height=16, width=16, **k)))):
        with pytest.raises(PrflError, match="x.mp4: cannot be decoded"):
            read(path, frames=3, fps=8)


def test_short_side_is_resized_and_the_centre_cut(tmp_path):
    """A wide picture with red left, grey middle, blue right thirds; a square cut keeps the middle third only."""
    pixels = torch.zeros(3, 5, 32, 96)
    pixels[0, :, :, :32], pixels[2, :, :, 64:] = 1, 1
    pixels = pixels + torch.arange(5)[:, None, None] * 0.01
    write_video(tmp_path / "x.mp4", pixels, 8)
    square = read_video(tmp_path / "x.mp4", VideoSize(5, 16, 16, 8))
    assert square.shape == (3, 5, 16, 16)
    assert square[..., 2:-2].abs().max() < 0.15
    whole = read_video(tmp_path / "x.mp4", VideoSize(5, 16, 48, 8))
    assert whole[0, 0, :, :12].min() > 0.8 and whole[2, 0, :, -12:].min() > 0.8


def test_reduction_is_antialiased(tmp_path):
    """Black and white columns in turn become grey; taking every second pixel would give black or white."""
    stripes = torch.ones(3, 5, 32, 64)
    stripes[..., ::2] = -1
    write_video(tmp_path / "x.mp4", stripes, 8)
    read = read_video(tmp_path / "x.mp4", VideoSize(3, 16, 32, 8))
    assert read[..., 4:-4].abs().max() < 0.1


def test_a_telephones_rotation_mark_is_followed(tmp_path):
    """rotation 90 = the player turns the picture counter-clockwise: the stored top becomes the left side."""
    pixels = disc(5, 32, 64)
    pixels[:, :, :8] = 1.0
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "6"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        stream.set_display_rotation(90)
        for index, picture in enumerate(((pixels + 1) * 127.5).byte().permute(1, 2, 3, 0).contiguous().numpy()):
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = read_video(tmp_path / "x.mp4", VideoSize(5, 64, 32, 8))
    expected = torch.rot90(pixels, 1, dims=(2, 3))
    assert (read - expected).abs().mean() < 0.03


def damaged(path, good: bytes) -> bytes:
    middle = len(good) // 2
    return {
        "empty": b"",
        "text": b"this is no video\n" * 100,
        "truncated": good[:middle],
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile other.mp4\n",
    }[path.stem]


@pytest.mark.parametrize("name", ["empty", "text", "truncated", "png", "playlist", "concat"])
def test_what_is_no_video_gives_one_clear_line(tmp_path, name):
    write_video(tmp_path / "other.mp4", disc(), 8)
    path = tmp_path / f"{name}.mp4"
    path.write_bytes(damaged(path, (tmp_path / "other.mp4").read_bytes()))
    with pytest.raises(PrflError, match="cannot be decoded") as caught:
        read_video(path, SIZE)
    assert caught.value.where == str(path) and "\n" not in caught.value.what


@pytest.mark.parametrize("suffix", ["webm", "gif"])
def test_a_truncated_stream_never_reads_as_whole(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_video(path, disc(), 8)
    good = path.read_bytes()
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(good[: int(len(good) * part)])
        with pytest.raises(PrflError):
            read_video(path, SIZE)


@pytest.mark.parametrize("cores", [1, 16])
def test_damage_in_the_middle_is_noticed(tmp_path, monkeypatch, cores):
    """More than one picture is overwritten; what h264 still takes for a picture nobody can notice."""

    def on_cores(container, path):
        stream = video_stream(container, path)
        stream.codec_context.thread_count = cores
        return stream

    video_stream = video.video_stream
    monkeypatch.setattr("prfl.data.video.video_stream", on_cores)
    path = tmp_path / "x.mp4"
    generator = torch.Generator().manual_seed(0)
    write_video(path, torch.rand(3, 17, 32, 32, generator=generator) * 2 - 1, 8)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + len(data) // 2
    data[at : at + 6000] = bytes(6000)
    path.write_bytes(bytes(data))
    with pytest.raises(PrflError, match="damaged|cannot be decoded"):
        read_video(path, SIZE)


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_too_short_by_one_frame_is_an_error(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_video(path, disc(16), 8)
    with pytest.raises(PrflError, match="too short"):
        read_video(path, SIZE)
    with pytest.raises(PrflError, match="too short"):
        read_video(path, SIZE, window="centre")
    read_video(path, replace(SIZE, frames=16))


def test_a_slide_show_is_no_video(tmp_path):
    steps(4, 1, tmp_path / "x.mp4")
    with pytest.raises(PrflError, match="4 different pictures where 17|only 3 different"):
        read_video(tmp_path / "x.mp4", SIZE)


def test_an_absurd_size_is_refused_before_decoding(tmp_path):
    write_video(tmp_path / "x.gif", disc(), 8)
    data = bytearray((tmp_path / "x.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"  # the canvas: 65,535 x 65,535
    (tmp_path / "x.gif").write_bytes(bytes(data))
    with pytest.raises(PrflError, match="65535 x 65535|cannot be decoded"):
        read_video(tmp_path / "x.gif", SIZE)


def test_sound_alone_and_wrong_suffixes(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 1024).numpy(), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(PrflError, match="no video stream"):
        read_video(tmp_path / "sound.mp4", SIZE)
    with pytest.raises(PrflError, match="no video suffix"):
        read_video(tmp_path / "x.txt", SIZE)
    with pytest.raises(PrflError, match="cannot be written"):
        write_video(tmp_path / "x.avi", disc(), 8)
    with pytest.raises(PrflError, match="there is no such file"):
        read_video(tmp_path / "nothing.mp4", SIZE)


@pytest.mark.parametrize("rate, asked", [("24000/1001", 0.0), ("30000/1001", -5e-4), ("60000/1001", 5e-4)])
def test_as_many_pictures_as_are_needed_are_enough(tmp_path, rate, asked):
    """One answer, whoever asks: the rate is written as 23.976, and rounded up or down."""
    encode(tmp_path / "x.mp4", [np.full((16, 16, 3), 3 * index, np.uint8) for index in range(81)], fps=Fraction(rate))
    fps = float(Fraction(rate)) + asked
    assert find_stretches(tmp_path / "x.mp4", frames=81, fps=fps).numbers == [0]
    assert read_video(tmp_path / "x.mp4", VideoSize(81, 16, 16, fps)).shape[1] == 81
    assert find_stretches(tmp_path / "x.mp4", frames=82, fps=fps).numbers == []
    with pytest.raises(PrflError, match="has 81 of the 82 pictures"):
        read_video(tmp_path / "x.mp4", VideoSize(82, 16, 16, fps))


@pytest.mark.parametrize("window", ["start", "centre"])
def test_an_edit_list_decides_what_is_shown(tmp_path, window):
    path = tmp_path / "x.mp4"
    steps(40, 8, path)
    cut_by_edit_list(path, first=11, count=20, fps=8)
    clip = dict(height=16, width=16, fps=8)
    shown = which(read_video(path, VideoSize(frames=20, **clip), window=window), 40)
    assert shown == list(range(11, 31))
    stretches = find_stretches(path, frames=6, fps=8)
    assert stretches == ([0, 1, 2], 0, None)
    clips = list(cut_video(path, stretches.numbers, VideoSize(frames=6, **clip)))
    assert [which(clip, 40) for clip in clips] == [shown[:6], shown[6:12], shown[12:18]]


def test_a_still_is_held_until_its_successor_comes(tmp_path):
    """1.7 s between two pictures, as screen recordings have it: the second one is not shown half of that too early."""
    times = [index / 8 for index in range(9)] + [2.7 + index / 8 for index in range(20)]
    pictures = [np.full((16, 16, 3), 4 * index, np.uint8) for index in range(len(times))]
    encode(tmp_path / "x.mp4", pictures, times=times)
    read = read_video(tmp_path / "x.mp4", VideoSize(30, 16, 16, 8))
    shown = [round(float(level + 1) * 127.5 / 4) for level in read.mean(dim=(0, 2, 3))]
    assert shown[:9] == list(range(9)) and shown[9:21] == [8] * 12 and shown[22:] == list(range(9, 17))
    stretches = find_stretches(tmp_path / "x.mp4", frames=8, fps=8)
    assert stretches == ([0, 3, 4], 2, None), "what stands still is left out, and the rest is not"


def test_the_last_picture_stands_as_long_as_the_file_says(tmp_path):
    """Eight pictures, and four seconds of the last one: up to as many repeats are a clip."""
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "0"})  # they come in the order of time
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        packets = []
        for index in range(8):
            frame = VideoFrame.from_ndarray(np.full((16, 16, 3), 20 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 8)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packets:
            packet.duration = round((4 if packet.pts == packets[-1].pts else 1 / 8) / packet.time_base)
        for packet in packets:
            container.mux(packet)
    clip = dict(height=16, width=16, fps=8)
    assert read_video(tmp_path / "x.mkv", VideoSize(frames=16, **clip)).shape[1] == 16
    with pytest.raises(PrflError, match="only 8 different pictures where 17"):
        read_video(tmp_path / "x.mkv", VideoSize(frames=17, **clip))
    assert find_stretches(tmp_path / "x.mkv", frames=8, fps=8).numbers == [0]


def test_a_file_that_lies_about_its_length_takes_no_memory(tmp_path):
    """Each of four pictures claims to be shown for four years: as a list of instants, 11 GiB and more."""
    path = tmp_path / "x.mp4"
    write_video(path, disc(4, 16, 16), 8)
    content = path.read_bytes()
    patch(path, b"mdhd", 16, struct.pack(">I", 16))
    entries = content.index(b"stts") + 8
    patch(path, b"stts", 12, struct.pack(">II", 4, 2**30))
    assert path.stat().st_size < 3000 and struct.unpack_from(">I", content, entries)[0] == 1
    tracemalloc.start()
    assert find_stretches(path, frames=5, fps=24).numbers == []
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_damage_behind_the_first_stretches_leaves_these(tmp_path):
    path = tmp_path / "x.mp4"
    generator = torch.Generator().manual_seed(0)
    write_video(path, torch.rand(3, 200, 32, 32, generator=generator) * 2 - 1, 8)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + len(data) * 3 // 4
    data[at : at + 6000] = bytes(6000)
    path.write_bytes(bytes(data))
    stretches = find_stretches(path, frames=10, fps=8)
    assert stretches.damage is not None and 3 < len(stretches.numbers) < 20
    assert len(list(cut_video(path, stretches.numbers, VideoSize(10, 16, 16, 8)))) == len(stretches.numbers)
