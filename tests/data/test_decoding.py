"""Files of the real world: whose pictures they are, in which colours, and which way up."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, ColorTrc

from prfl.data.video import read_video, write_video
from prfl.evaluation.media import browser_mp4
from prfl.utils.decoding import BT601, BT709, picture_hash, read_anew
from prfl.utils.errors import PrflError
from prfl.utils.hashing import content_hash
from prfl.utils.video_size import VideoSize
from tests.data.files_as_they_are import bars, encode, patch, set_display_matrix

CLOSE = 2.0  # of 255: what eight bits and halved colour planes leave of large plain areas


def levels(path: Path, height: int, width: int) -> np.ndarray:
    pixels = read_video(path, VideoSize(2, height, width, 8))[:, 0]
    return ((pixels + 1) * 127.5).permute(1, 2, 0).numpy()


def away(path: Path, height: int, width: int) -> float:
    """Mean distance from the bars, of 255."""
    return float(np.abs(levels(path, height, width) - bars(height, width)).mean())


@pytest.mark.parametrize(
    ("height", "matrix", "tag"),
    [
        (720, Colorspace.ITU709, None),  # players take it for BT.709
        (720, Colorspace.ITU709, BT709),
        (720, Colorspace.ITU601, BT601),
        (718, Colorspace.ITU601, None),
        (96, Colorspace.ITU601, None),
        (96, Colorspace.ITU709, BT709),
    ],
)
def test_colours_are_those_that_players_show(tmp_path: Path, height: int, matrix: Colorspace, tag: int | None) -> None:
    width = 112
    tags = {} if tag is None else {"colorspace": tag, "color_primaries": 1, "color_trc": 1, "color_range": 1}
    encode(tmp_path / "x.mp4", [bars(height, width)] * 2, matrix=matrix, **tags)
    assert away(tmp_path / "x.mp4", height, width) < CLOSE


@pytest.mark.parametrize(("height", "matrix"), [(720, BT709), (96, BT601)])
@pytest.mark.parametrize("how", ["mp4", "webm", "browser"])
def test_what_is_written_says_its_colours_and_comes_back(tmp_path: Path, height: int, matrix: int, how: str) -> None:
    path, width = tmp_path / f"x.{'webm' if how == 'webm' else 'mp4'}", 224
    pixels = torch.from_numpy(bars(height, width)).permute(2, 0, 1)[:, None].expand(3, 2, height, width) / 127.5 - 1
    if how == "browser":
        path.write_bytes(browser_mp4(pixels, 8.0, smallest_side=96))
    else:
        write_video(path, pixels, 8)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    tags = [frame.colorspace, frame.color_range]
    if how != "webm":  # VP9 carries the matrix and the range alone
        tags += [frame.color_primaries, frame.color_trc]
    assert tags == [matrix, 1, 1, 1][: len(tags)]
    assert away(path, height, width) < CLOSE


ORIENTATIONS = {
    "as stored": ((1, 0, 0, 1), lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p.flip(2)),
    "turned by 180": ((-1, 0, 0, -1), lambda p: p.flip(1, 2)),
    "upside down": ((1, 0, 0, -1), lambda p: p.flip(1)),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 2)),
    "turned by 90": ((0, 1, -1, 0), lambda p: torch.rot90(p, -1, (1, 2))),
    "transversed": ((0, -1, -1, 0), lambda p: p.transpose(1, 2).flip(1, 2)),
    "turned by 270": ((0, -1, 1, 0), lambda p: torch.rot90(p, 1, (1, 2))),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_all_eight_orientations(tmp_path: Path, name: str) -> None:
    cells, turn = ORIENTATIONS[name]
    stored = torch.full((3, 32, 64), -0.5)
    stored[:, 4:28, 8:16] = stored[:, 4:10, 8:40] = 0.8  # a gamma: no two of its orientations look the same
    write_video(tmp_path / "x.mp4", stored[:, None].expand(3, 2, 32, 64), 8)
    set_display_matrix(tmp_path / "x.mp4", *cells)
    expected = turn(stored)
    read = read_video(tmp_path / "x.mp4", VideoSize(2, expected.shape[1], expected.shape[2], 8))[:, 0]
    assert (read - expected).abs().mean() < 0.02


def test_a_turn_that_is_no_right_angle_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", torch.zeros(3, 2, 32, 32), 8)
    set_display_matrix(tmp_path / "x.mp4", 0.8, 0.6, -0.6, 0.8)
    with pytest.raises(PrflError, match="turned by 37 degrees"):
        read_video(tmp_path / "x.mp4", VideoSize(2, 32, 32, 8))


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [(0, Disposition.default, 1), (Disposition.default, Disposition.default, 0), (0, 0, 0)],
)
def test_the_stream_that_players_show(tmp_path: Path, first: int, second: int, shown: int) -> None:
    colours = [[200, 20, 20], [20, 20, 200]]
    with av.open(str(tmp_path / "x.mkv"), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in colours]
        for stream, disposition in zip(streams, (first, second), strict=True):
            stream.width, stream.height, stream.pix_fmt, stream.disposition = 32, 32, "yuv444p", disposition
        for stream, colour in zip(streams, colours, strict=True):
            for index in range(2):
                frame = VideoFrame.from_ndarray(np.full((32, 32, 3), colour, np.uint8), format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert np.abs(levels(tmp_path / "x.mkv", 32, 32) - colours[shown]).mean() < CLOSE


def cover(path: Path, video: bool) -> None:
    """A picture of a disc, as music players show it, before the video."""
    with av.open(str(path), "w") as container:
        still = container.add_stream("mjpeg", rate=8)
        still.width, still.height, still.pix_fmt, still.disposition = 32, 32, "yuvj420p", Disposition.attached_pic
        moving = None
        if video:
            moving = container.add_stream("libx264", rate=8)
            moving.width, moving.height, moving.pix_fmt = 112, 32, "yuv420p"
        container.mux(still.encode(VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(still.encode(None))
        if moving:
            for _ in range(2):
                container.mux(moving.encode(VideoFrame.from_ndarray(bars(32, 112), format="rgb24")))
            container.mux(moving.encode(None))


def test_a_cover_is_no_video(tmp_path: Path) -> None:
    cover(tmp_path / "film.mp4", video=True)
    assert away(tmp_path / "film.mp4", 32, 112) < CLOSE
    cover(tmp_path / "song.mp4", video=False)
    with pytest.raises(PrflError, match="holds no video stream"):
        read_video(tmp_path / "song.mp4", VideoSize(2, 32, 112, 8))


@pytest.mark.parametrize(("transfer", "name"), [(ColorTrc.SMPTE2084, "PQ"), (ColorTrc.ARIB_STD_B67, "HLG")])
def test_hdr_is_refused_with_the_reason(tmp_path: Path, transfer: ColorTrc, name: str) -> None:
    encode(tmp_path / "x.mp4", [bars(32, 112)] * 2, pixels="yuv420p10le", color_trc=transfer, color_primaries=9)
    with pytest.raises(PrflError, match=f"(?s)HDR video \\({name}.*tonemap"):
        read_video(tmp_path / "x.mp4", VideoSize(2, 32, 32, 8))


def test_a_colour_matrix_that_nobody_converts_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "x.mp4", [bars(32, 112)] * 2, pixels="yuv444p", colorspace=8)  # YCgCo
    with pytest.raises(PrflError, match="colour matrix \\(number 8 of H.273\\)"):
        read_video(tmp_path / "x.mp4", VideoSize(2, 32, 32, 8))


def test_a_title_that_is_not_utf8_is_no_fault(tmp_path: Path) -> None:
    write_video(tmp_path / "plain.mkv.mp4", torch.zeros(3, 2, 16, 16), 8)
    with av.open(str(tmp_path / "plain.mkv.mp4")) as source, av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        container.metadata["title"] = "a title"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    patch(tmp_path / "x.mp4", b"a title", 0, b"a \xff\xfe\xe9le")
    assert read_video(tmp_path / "x.mp4", VideoSize(2, 16, 16, 8)).abs().max() < 0.02


def test_a_codec_that_is_not_built_in_is_named_as_the_reason(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", torch.zeros(3, 2, 16, 16), 8)
    (tmp_path / "x.mp4").write_bytes(re.sub(b"avc1", b"evc1", (tmp_path / "x.mp4").read_bytes()))
    with pytest.raises(PrflError, match="a codec that this FFmpeg .* cannot decode"):
        read_video(tmp_path / "x.mp4", VideoSize(2, 16, 16, 8))


def test_only_what_is_read_otherwise_than_before_has_a_new_key(tmp_path: Path) -> None:
    """Cached latents of all other files stay good."""
    small, mirrored, large = (tmp_path / f"{name}.mp4" for name in ("small", "mirrored", "large"))
    for path in (small, mirrored):
        write_video(path, torch.zeros(3, 2, 16, 16), 8)
    set_display_matrix(mirrored, -1, 0, 0, 1)
    encode(large, [bars(720, 32)] * 2)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    assert [read_anew(path) for path in (small, mirrored, large)] == [(), ("mirrored",), ("bt709 by size",)]
    assert picture_hash(small) == content_hash(small) and picture_hash(large).startswith(content_hash(large) + "+")
    assert picture_hash(tmp_path / "broken.mp4") == content_hash(tmp_path / "broken.mp4")
