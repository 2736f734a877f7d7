"""Video files in and out, by PyAV.

Pixels are float32 in [-1, 1], (3, frames, height, width), on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from jaxtyping import Float
from torch import Tensor

from prfl.utils.decoding import (
    AGAIN,
    BT601,
    BT709,
    Shown,
    aspect,
    decoded,
    fitted_picture,
    high_definition,
    opened,
    readable,
    video_stream,
)
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.formats import SUFFIXES, Window
from prfl.utils.video_size import VideoSize

# For frames as small as those of the shapes world, x264's assembly code writes files that differ between processes and
# CPUs: about one file in seven at 32 x 32 pixels.  With cpu-independent the result is always the same.
_CODEC = {
    ".mp4": (
        "libx264", "yuv444p", {"crf": "6", "preset": "medium", "threads": "1", "x264-params": "cpu-independent=1"},
    ),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "10", "b:v": "0", "cpu-used": "4", "threads": "1"}),
}  # fmt: skip


class Stretches(NamedTuple):
    """The stretches of a video that can be cut as clips.

    numbers: their numbers; a video is divided into stretches of equal length, counted from its start.  still: how many
    stretches are left out because more than half of their pictures would be repeats.  damage: the error at which
    decoding stopped; None if the video decodes to its end.
    """

    numbers: list[int]
    still: int
    damage: PrflError | None


def read_video(path: str | Path, size: VideoSize, *, window: Window = "start") -> Float[Tensor, "3 f h w"]:
    """Read ``size.frames`` pictures, 1/fps seconds apart, resized and cropped to the size.

    window: whether the clip is taken from the start or the middle of the video.
    At each instant the nearest picture of the file is taken; a picture that the file shows for longer than two of these
    steps is held until the next one.  Raises PrflError when the file is not a readable video, is damaged or too short,
    or has so few pictures that more than half of the clip would be repeats.
    """
    path, frames, fps = Path(path), size.frames, size.fps
    with readable(path):
        first = 0.0
        if window == "centre":
            with opened(path) as container:
                last = max((shown.time for shown in decoded(container, video_stream(container, path), path)), default=0)
            first = max(0.0, (last - (frames - 1) / fps) / 2)

        targets = (first + index / fps for index in range(frames))
        pictures = list(_pictures_at(path, targets, size))

        if not pictures:
            raise PrflError("holds no pictures", where=str(path), fix=AGAIN)
        if len(pictures) < frames:
            what = f"is too short: it has {len(pictures)} of the {frames} pictures that are needed at {fps:g} fps"
            raise PrflError(what, where=str(path), fix="fewer frames, a higher fps, or leave this file out")
        if not _moves(pictures):
            distinct = len({id(picture) for picture in pictures})
            what = f"has only {distinct} different pictures where {frames} at {fps:g} fps are needed"
            raise PrflError(what, where=str(path), fix="lower fps, or leave this file out")
        return torch.stack(pictures, dim=1)


def find_stretches(path: str | Path, *, frames: int, fps: int | float) -> Stretches:
    """Find the stretches that ``cut_video`` can cut.  The whole video is decoded, since its header may be wrong.

    Raises PrflError as ``read_video`` does.  Damage after the first pictures is returned instead (``damage``).
    """
    path = Path(path)

    # Decode the video to learn when each picture is shown.
    times: list[Shown[int]] = []
    damage = None
    try:
        with readable(path), opened(path) as container:
            for number, shown in enumerate(decoded(container, video_stream(container, path), path)):
                times.append(Shown(shown.time, shown.duration, number))
    except PrflError as error:
        if len(times) < 2:
            raise
        damage = error
        times.pop()  # without a successor, it is unknown until when the last picture is the nearest

    numbers = list(dict.fromkeys(round(shown.time * fps) // frames for shown in times))

    # Count the complete stretches, and keep those that move.
    chosen = _nearest(times, _targets(numbers, frames, fps), fps)
    complete = 0
    moving = []
    for number in numbers:
        pictures = list(islice(chosen, frames))
        if len(pictures) == frames:
            complete = number + 1
            if _moves(pictures):
                moving.append(number)
    return Stretches(moving, complete - len(moving), damage)


def cut_video(path: str | Path, numbers: Sequence[int], size: VideoSize) -> Iterator[Float[Tensor, "3 f h w"]]:
    """Cut the clips of these stretches (``find_stretches``), in order.

    The video is decoded once.  Pictures are chosen, resized and cropped as in ``read_video``, which lists the errors.
    """
    path = Path(path)
    with readable(path):
        pictures = _pictures_at(path, _targets(numbers, size.frames, size.fps), size)
        for _ in numbers:
            yield torch.stack(list(islice(pictures, size.frames)), dim=1)


def write_video(path: str | Path, pixels: Float[Tensor, "3 f h w"], fps: int | float) -> None:
    """Write pixels in [-1, 1] (clamped) to a file, atomically; makes its folder.

    .mp4: H.264 4:4:4, nearly lossless, for data and caches.  .webm: VP9 4:2:0, plays in every browser.  .gif: one
    palette per clip.  Colours are tagged (``tag_colours``), except in a .gif.  Raises PrflError for other suffixes.
    """
    path = Path(path)
    if path.suffix not in (".mp4", ".webm", ".gif"):
        raise PrflError(f"'{path.suffix}' cannot be written", where=str(path), fix="use .mp4, .webm or .gif")
    levels = (pixels.detach().float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    pictures = levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()  # (f, h, w, 3)
    rate = Fraction(fps).limit_denominator(1000)

    with atomic_write(path) as temporary, av.open(str(temporary), "w", format=SUFFIXES[path.suffix]) as container:
        if path.suffix == ".gif":
            _write_gif(container, pictures, rate)
            return

        codec, pixel_format, options = _CODEC[path.suffix]
        stream = container.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], pixel_format
        stream.time_base = 1 / rate
        tag_colours(stream)

        for index, picture in enumerate(pictures):
            frame = in_colours_of(stream, picture)
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def tag_colours(stream: VideoStream) -> None:
    """Tag a stream with how its colours are to be shown, so that people see the same colours as a reward.

    The matrix is the one that players assume for a video of this size without tags: BT.709 from 720 lines on, BT.601
    below.  Primaries and transfer are those of BT.709 in both cases.
    """
    context = stream.codec_context
    context.colorspace = BT709 if high_definition(stream.height) else BT601
    context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
    context.color_range = ColorRange.MPEG


def in_colours_of(stream: VideoStream, picture: np.ndarray) -> VideoFrame:
    """Convert (h, w, 3) uint8 RGB to a frame in the stream's pixel format and colour matrix."""
    matrix = Colorspace.ITU709 if stream.colorspace == BT709 else Colorspace.ITU601
    frame = VideoFrame.from_ndarray(picture, format="rgb24")
    # On one thread: on several, the slices' borders would differ with the number of cores.
    return frame.reformat(format=stream.pix_fmt, dst_colorspace=matrix, dst_color_range=ColorRange.MPEG, threads=1)


def _pictures_at(path: Path, targets: Iterable[float], size: VideoSize) -> Iterator[Float[Tensor, "3 h w"]]:
    """Yield the resized and cropped picture at each instant, until the video ends.

    A picture that is repeated is yielded as the same tensor.
    """
    with opened(path) as container:
        stream = video_stream(container, path)
        pixel_aspect = aspect(stream, path)
        last = None
        for frame in _nearest(decoded(container, stream, path), targets, size.fps):
            if frame is not last:
                fitted = fitted_picture(frame, pixel_aspect, size.height, size.width, path)
                last = frame
            yield fitted


def _targets(numbers: Iterable[int], frames: int, fps: int | float) -> Iterator[float]:
    """Yield the instants of these stretches' frames, in seconds."""
    for number in numbers:
        for index in range(number * frames, (number + 1) * frames):
            yield index / fps


def _moves(pictures: Sequence[object]) -> bool:
    """Tell whether at least half of the clip's pictures are distinct pictures of the file."""
    return 2 * len({id(picture) for picture in pictures}) >= len(pictures)


T = TypeVar("T")


def _nearest(decoded: Iterable[Shown[T]], targets: Iterable[float], fps: int | float) -> Iterator[T]:
    """Yield, for each target instant in order, the picture nearest in time; stops when the last picture is over.

    A picture that is shown for longer than two steps of 1/fps is a still.  Players hold it until the next picture, so
    it is chosen up to half a step before the next picture's time.  Decoding stops after the last target.
    """
    waiting = iter(targets)
    target = next(waiting, None)
    previous: Shown[T] | None = None
    interval = 0.0

    for shown in decoded:
        interval = shown.time - previous.time if previous is not None else 0.0
        while target is not None and shown.time >= target:
            ahead = shown.time - target
            if previous is None:
                take_previous = False
            elif interval <= 2 / fps:
                take_previous = target - previous.time < ahead
            else:  # a still
                take_previous = ahead > 0.5 / fps
            yield previous.frame if take_previous and previous is not None else shown.frame
            target = next(waiting, None)
        if target is None:
            return
        previous = shown

    # Targets after the last picture's time take it for as long as the file shows it.
    if previous is None:
        return
    over = previous.time + max(interval / 2, previous.duration - interval / 2)
    while target is not None and target <= over:
        yield previous.frame
        target = next(waiting, None)


def _write_gif(container: av.container.OutputContainer, pictures: np.ndarray, rate: Fraction) -> None:
    """Write a gif with one palette for the whole clip: the encoder's own 256 colours are too coarse."""
    height, width = pictures.shape[1:3]

    # source -> split -> (palettegen, paletteuse) -> sink
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

    # The palette is known only when all pictures are in.
    for index, picture in enumerate(pictures):
        frame = VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = index, 1 / rate
        source.push(frame)
    source.push(None)

    for index in range(len(pictures)):
        coloured = graph.pull()
        assert isinstance(coloured, VideoFrame)
        coloured.pts, coloured.time_base = math.floor(index * 100 / rate + Fraction(1, 2)), Fraction(1, 100)
        container.mux(stream.encode(coloured))
    container.mux(stream.encode(None))
