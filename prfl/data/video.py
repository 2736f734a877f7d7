"""Video files in and out, by PyAV.

Pixels are float32 in [-1, 1], (3, frames, height, width), on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float
from torch import Tensor

from prfl.data.files import replacing
from prfl.errors import PrflError

Window = Literal["start", "centre"]

SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".gif": "gif"}
"""Readable suffixes; .mp4, .webm and .gif are written."""

# Formats such as playlists make a reader open other files or addresses, whatever the file is called.
_SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif"}
_MAX_PIXELS = 8192 * 4320
_MAX_ASPECT = 8
AGAIN = "download or encode it again: ffmpeg -i IN OUT.mp4"
_CODEC = {
    ".mp4": ("libx264", "yuv444p", {"crf": "6", "preset": "medium", "threads": "1"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "10", "b:v": "0", "cpu-used": "4", "threads": "1"}),
}


def read_video(
    path: str | Path, *, frames: int, height: int, width: int, fps: int | float, window: Window = "start"
) -> Float[Tensor, "3 f h w"]:
    """``frames`` pictures, 1/fps seconds apart, from the start or around the middle; short side resized, centre cut.

    At each instant the nearest picture of the file is taken.  Raises PrflError with the reason when the file is no
    video that we read, is damaged or too short, or has so few pictures that more than half would be repeats.
    """
    path = Path(path)
    with _readable(path):
        first = max(0.0, (_length(path) - (frames - 1) / fps) / 2) if window == "centre" else 0.0
        targets = [first + index / fps for index in range(frames)]
        return _clip(list(_pictures_at(path, targets, height, width)), path, fps)


def count_clips(path: str | Path, *, frames: int, fps: int | float) -> int:
    """How many clips ``cut_video`` finds, without decoding.  Raises PrflError as ``read_video`` does."""
    path = Path(path)
    with _readable(path):
        return (math.floor(_length(path) * fps + 1e-6) + 1) // frames


def cut_video(
    path: str | Path, *, frames: int, height: int, width: int, fps: int | float
) -> Iterator[Float[Tensor, "3 f h w"]]:
    """One clip behind the other, 1/fps seconds between them too, until the video ends; it is decoded once.

    Each clip is as ``read_video`` gives it.  Raises PrflError as that does.
    """
    path = Path(path)
    with _readable(path):
        count = count_clips(path, frames=frames, fps=fps)
        pictures = _pictures_at(path, [index / fps for index in range(count * frames)], height, width)
        for _ in range(count):
            yield _clip(list(islice(pictures, frames)), path, fps)


def write_video(path: str | Path, pixels: Float[Tensor, "3 f h w"], fps: int | float) -> None:
    """Pixels in [-1, 1] (clamped) to a file; atomic; makes the folder.

    .mp4: h264 4:4:4, nearly lossless, for data and caches.  .webm: vp9 4:2:0, plays in every browser.  .gif: one
    palette a clip.  Raises PrflError for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".mp4", ".webm", ".gif"):
        raise PrflError(f"'{path.suffix}' cannot be written", where=str(path), fix="use .mp4, .webm or .gif")
    levels = (pixels.detach().float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    pictures = levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()  # (f, h, w, 3)
    rate = Fraction(fps).limit_denominator(1000)
    sources = []
    for index, picture in enumerate(pictures):
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        sources.append(frame)
    with replacing(path) as temporary, av.open(str(temporary), "w", format=SUFFIXES[path.suffix]) as container:
        if path.suffix == ".gif":
            _write_gif(container, sources, rate)
            return
        codec, pixel_format, options = _CODEC[path.suffix]
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], pixel_format
        stream.time_base = 1 / rate
        for frame in sources:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises PrflError for a suffix that is not read, and in place of PyAV's own errors."""
    if path.suffix.lower() not in SUFFIXES:
        what = f"'{path.suffix}' is no video suffix that prfl reads"
        raise PrflError(what, where=str(path), fix=f"one of {', '.join(SUFFIXES)}")
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise PrflError(f"cannot be decoded: {error.strerror or error}", where=str(path), fix=AGAIN) from error


def _pictures_at(path: Path, targets: list[float], height: int, width: int) -> Iterator[Float[Tensor, "3 h w"]]:
    """The fitted picture nearest to each of the instants; the same tensor again where a picture is repeated."""
    with _opened(path) as container:
        stream = _video_stream(container, path)
        aspect = _aspect(stream, path)
        last = None
        for frame in _nearest(_decoded(container, stream, path), targets, path):
            if frame is not last:
                fitted = _fit(_picture(frame), height, width, aspect if frame.rotation % 180 == 0 else 1 / aspect)
                last = frame
            yield fitted


def _clip(pictures: list[Tensor], path: Path, fps: int | float) -> Float[Tensor, "3 f h w"]:
    distinct = len({id(picture) for picture in pictures})
    if distinct < len(pictures) / 2:
        what = f"has only {distinct} different pictures where {len(pictures)} at {fps:g} fps are needed"
        raise PrflError(what, where=str(path), fix="lower fps, or leave this file out")
    return torch.stack(pictures, dim=1)


def _opened(path: Path) -> av.container.InputContainer:
    return av.open(str(path.absolute()), options=_SAFE)


def _video_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    if not container.streams.video:
        raise PrflError("holds no video stream", where=str(path), fix="give a video file, not a sound or a still")
    stream = container.streams.video[0]
    if stream.width * stream.height > _MAX_PIXELS:
        raise PrflError(
            f"is {stream.width} x {stream.height}, more than prfl reads",
            where=str(path),
            fix="scale it down first: ffmpeg -i IN -vf scale=-2:720 OUT",
        )
    stream.thread_type = "AUTO"
    return stream


def _aspect(stream: VideoStream, path: Path) -> float:
    """A pixel's width / height.  A header may lie: pictures are resized by it, to any size."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
        what = f"claims that its pixels are {aspect:.4g} times as wide as high"
        raise PrflError(what, where=str(path), fix="encode the file again, with square pixels")
    return aspect


def _decoded(
    container: av.container.InputContainer, stream: VideoStream, path: Path
) -> Iterator[tuple[float, VideoFrame]]:
    """(seconds since the first picture, picture)."""
    start = None
    for frame in container.decode(stream):
        if frame.is_corrupt or frame.width * frame.height > _MAX_PIXELS:
            raise PrflError("is damaged: a picture cannot be decoded", where=str(path), fix=AGAIN)
        if frame.time is None:
            raise PrflError("has a picture without a time", where=str(path), fix=AGAIN)
        start = frame.time if start is None else start
        yield frame.time - start, frame


def _nearest(decoded: Iterable[tuple[float, VideoFrame]], targets: list[float], path: Path) -> Iterator[VideoFrame]:
    """For each target, in order, the picture nearest in time; stops decoding after the last one."""
    waiting = iter(targets)
    target: float | None = next(waiting)
    previous: tuple[float, VideoFrame] | None = None
    interval = 0.0
    for time, frame in decoded:
        while target is not None and time >= target:
            before = previous is not None and target - previous[0] < time - target
            yield previous[1] if before and previous is not None else frame
            target = next(waiting, None)
        if target is None:
            return
        interval = time - previous[0] if previous is not None else 0.0
        previous = (time, frame)
    while target is not None:  # the file is over: its last picture stands for half an interval more
        if previous is None:
            raise PrflError("holds no pictures", where=str(path), fix=AGAIN)
        if target > previous[0] + interval / 2:
            what = f"is too short: its last picture is at {previous[0]:.2f} s, one at {targets[-1]:.2f} s is needed"
            raise PrflError(what, where=str(path), fix="fewer frames, a higher fps, or leave this file out")
        yield previous[1]
        target = next(waiting, None)


def _length(path: Path) -> float:
    """Seconds from the first picture to the last; the times come from the packets, without decoding."""
    with _opened(path) as container:
        stream = _video_stream(container, path)
        times = [packet.pts * packet.time_base for packet in container.demux(stream) if packet.pts is not None]
    return float(max(times) - min(times)) if times else 0.0


def _picture(frame: VideoFrame) -> Float[Tensor, "3 h w"]:
    """In [-1, 1], turned the way that its rotation mark says (telephones write such marks)."""
    picture = np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 127.5 - 1


def _fit(picture: Float[Tensor, "3 h w"], height: int, width: int, aspect: float) -> Float[Tensor, "3 H W"]:
    """Scaled until it covers height x width, then cut around the middle.  ``aspect``: a source pixel's width/height."""
    _, from_height, from_width = picture.shape
    scale = max(height / from_height, width / (from_width * aspect))
    size = max(height, round(from_height * scale)), max(width, round(from_width * aspect * scale))
    if size != (from_height, from_width):
        picture = torch.nn.functional.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width]


def _write_gif(container: av.container.OutputContainer, sources: list[VideoFrame], rate: Fraction) -> None:
    """One palette for the whole clip: the encoder's own 256 colours are too coarse."""
    height, width = sources[0].height, sources[0].width
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=1 / rate)
    both, palette = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(both)
    both.link_to(palette, 0, 0)
    both.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    stream = container.add_stream("gif", rate=rate)
    assert isinstance(stream, VideoStream)
    stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
    stream.time_base = Fraction(1, 100)  # a gif counts hundredths of a second
    for picture in sources:
        source.push(picture)
    source.push(None)
    for index in range(len(sources)):
        frame = graph.pull()
        assert isinstance(frame, VideoFrame)
        frame.pts, frame.time_base = math.floor(index * 100 / rate + Fraction(1, 2)), Fraction(1, 100)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
