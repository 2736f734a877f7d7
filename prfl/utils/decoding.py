"""Decode a video file to pictures: which stream, in which colours, which way up, and when each picture is shown.

The header of a real file may be wrong.  So nothing from it is used to reserve memory or to decide how long a video is:
that follows from the pictures as they are decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar, cast

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer, Type
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc
from av.video.stream import VideoStream
from jaxtyping import Float
from torch import Tensor

from prfl.utils.errors import PrflError
from prfl.utils.formats import SUFFIXES
from prfl.utils.hashing import remembered_hash
from prfl.utils.pictures import fitted
from prfl.utils.reading import disk_refuses, unreadable

# Formats such as playlists make a reader open other files or addresses, whatever the file is called.
_SAFE = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif"}
_MAX_PIXELS = 8192 * 4320
_MAX_ASPECT = 8
AGAIN = "download or encode it again: ffmpeg -i IN OUT.mp4"
_COVERS = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image

# Numbers of ITU-T H.273, as files carry them.
BT709, UNSPECIFIED, BT601 = 1, 2, 6
_CONVERTED = {0, BT709, UNSPECIFIED, 4, 5, BT601, 7, 9, 10}  # colour matrices that FFmpeg turns into RGB
_HDR = {ColorTrc.SMPTE2084: "PQ, as HDR10 has it", ColorTrc.ARIB_STD_B67: "HLG"}
TO_SDR = (
    "map it to SDR first: ffmpeg -i IN -vf zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709:r=tv,"
    "format=yuv420p OUT.mp4"
)


T = TypeVar("T")


@dataclass(frozen=True)
class Shown(Generic[T]):
    """A picture with its time since the first picture, and how long the file shows it, both in seconds."""

    time: float
    duration: float
    frame: T


def high_definition(height: int) -> bool:
    """Tell whether players assume BT.709, not BT.601, for an untagged video; we write videos by the same rule."""
    return height >= 720


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise PrflError for an unsupported suffix, and turn what PyAV raises inside into a PrflError."""
    if path.suffix.lower() not in SUFFIXES:
        what = f"'{path.suffix}' is no video suffix that prfl reads"
        raise PrflError(what, where=str(path), fix=f"one of {', '.join(SUFFIXES)}")
    try:
        yield
    except PrflError:
        raise
    except (av.FFmpegError, OSError) as error:
        if isinstance(error, OSError) and disk_refuses(path, error):
            raise unreadable(path, error, "name a video that is there") from error
        raise PrflError(f"cannot be decoded: {error.strerror or error}", where=str(path), fix=AGAIN) from error
    except (ValueError, LookupError, ArithmeticError) as error:
        what = f"cannot be decoded: {type(error).__name__}: {error}"
        raise PrflError(what, where=str(path), fix=AGAIN) from error


def opened(path: Path) -> av.container.InputContainer:
    """Open a video file.  Metadata that are not UTF-8, such as a title, are not an error."""
    return av.open(str(path.absolute()), options=_SAFE, metadata_errors="replace")


def video_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    """Choose the stream that players show: the first marked as default, or else the first; never a cover or thumbnail.

    Raises PrflError if there is none, or if its codec or size is not supported.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & _COVERS]
    if not streams:
        raise PrflError("holds no video stream", where=str(path), fix="give a video file, not a sound or a still")
    stream = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
    if stream.codec_context is None:
        raise PrflError(
            f"is of a codec that this FFmpeg (libavcodec {av.library_versions['libavcodec'][0]}) cannot decode",
            where=str(path),
            fix="encode it as H.264: ffmpeg -i IN -c:v libx264 OUT.mp4",
        )
    _check_size(stream.width, stream.height, path)
    stream.thread_type = "SLICE"  # with frame threads FFmpeg silently drops damaged pictures at a video's end
    return stream


def aspect(stream: VideoStream, path: Path) -> float:
    """Read the width / height of a pixel.  Raises PrflError for an extreme value: pictures are resized by it."""
    value = float(stream.sample_aspect_ratio or 1)
    if not 1 / _MAX_ASPECT <= value <= _MAX_ASPECT:
        what = f"claims that its pixels are {value:.4g} times as wide as high"
        raise PrflError(what, where=str(path), fix="encode the file again, with square pixels")
    return value


def decoded(container: av.container.InputContainer, stream: VideoStream, path: Path) -> Iterator[Shown[VideoFrame]]:
    """Decode every picture that is shown, in order, without those that an edit list cuts off."""
    start = None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise PrflError("is damaged: a picture cannot be decoded", where=str(path), fix=AGAIN)
        _check_size(frame.width, frame.height, path)
        _check_colours(frame, path)
        if frame.time is None:
            raise PrflError("has a picture without a time", where=str(path), fix=AGAIN)

        start = frame.time if start is None else start
        duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
        yield Shown(frame.time - start, duration, frame)


def fitted_picture(frame: VideoFrame, aspect: float, height: int, width: int, path: Path) -> Float[Tensor, "3 h w"]:
    """Turn a frame into pixels in [-1, 1], in the colours and orientation that players show.

    The picture is scaled until it covers height x width, and cropped to it.  aspect: a stored pixel's width / height.
    """
    if _guessed(frame):
        frame.colorspace = BT709
    levels = rgb_levels(frame)

    transposed, from_right, from_below = orientation(frame, path)
    if transposed:
        levels, aspect = levels.transpose(1, 0, 2), 1 / aspect
    levels = levels[:: -1 if from_below else 1, :: -1 if from_right else 1]
    pixels = torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 127.5 - 1
    return fitted(pixels, height, width, aspect)


def first_picture(path: Path, height: int, width: int) -> Float[Tensor, "3 h w"]:
    """Read a video's first picture as ``fitted_picture`` returns it.  Raises PrflError for an unreadable video."""
    with readable(path), opened(path) as container:
        stream = video_stream(container, path)
        for shown in decoded(container, stream, path):
            return fitted_picture(shown.frame, aspect(stream, path), height, width, path)
        raise PrflError("holds no pictures", where=str(path), fix=AGAIN)


def rgb_levels(frame: VideoFrame) -> np.ndarray:
    """Turn a frame into (height, width, 3) levels of 0 to 255, as it is stored.

    It runs on one thread: starting several for each frame takes milliseconds, 80 times as long as converting a small
    frame.
    """
    return frame.reformat(format="rgb24", threads=1).to_ndarray()


def orientation(frame: VideoFrame, path: Path) -> tuple[bool, bool, bool]:
    """Read from the display matrix: (whether to transpose, then to mirror left to right, then to flip upside down).

    Phones write such matrices; their selfies are mirrored.  Raises PrflError for a rotation that is not a multiple of
    90 degrees.
    """
    a, b, c, d = _display_matrix(frame)  # a pixel at (p, q) is shown at (a p + c q, b p + d q), y downwards
    transposed = abs(b) > abs(a)
    if min(abs(a), abs(b)) > 0.02 * max(abs(a), abs(b)):
        what = f"is to be shown turned by {math.degrees(math.atan2(b, a)):.0f} degrees, which is no right angle"
        raise PrflError(what, where=str(path), fix="encode it again, upright: ffmpeg -i IN OUT.mp4")
    return (True, c < 0, b < 0) if transposed else (False, a < 0, d < 0)


def picture_hash(path: Path) -> str:
    """Hash a video's bytes and, for the few videos that earlier versions read differently, how they are read now.

    It is the key for everything that is cached of a video's pictures.  Raises OSError if the bytes cannot be read.
    """
    return "+".join([remembered_hash(path), *read_anew(path)])


def read_anew(path: Path) -> tuple[str, ...]:
    """List why a video is read differently than by earlier versions; () for most videos, and for unreadable files."""
    now = path.stat()
    return _read_anew(path, now.st_size, now.st_mtime_ns)


BY_SIZE = "bt709 by size"


@lru_cache(maxsize=100_000)
def _read_anew(path: Path, size: int, changed: int) -> tuple[str, ...]:
    try:
        with readable(path), opened(path) as container:
            stream = video_stream(container, path)
            stream.thread_type = "NONE"  # for one picture, threads cost more than they save
            frame = next(container.decode(stream))
            facts = {
                BY_SIZE: _guessed(frame),
                "mirrored": orientation(frame, path) in _MIRRORED,
                "default stream": stream.index != container.streams.video[0].index,
            }
    except (PrflError, StopIteration):
        return ()
    return tuple(name for name, holds in facts.items() if holds)


_MIRRORED = {(False, True, False), (False, False, True), (True, False, False), (True, True, True)}


def _guessed(frame: VideoFrame) -> bool:
    """Tell whether the frame is taken for BT.709 because of its size alone."""
    coded_as_rgb = frame.format.is_rgb or frame.format.has_palette
    return frame.colorspace == UNSPECIFIED and not coded_as_rgb and high_definition(frame.height)


def _check_size(width: int, height: int, path: Path) -> None:
    if width * height > _MAX_PIXELS:
        fix = "scale it down first: ffmpeg -i IN -vf scale=-2:720 OUT"
        raise PrflError(f"is {width} x {height}, more than prfl reads", where=str(path), fix=fix)


def _check_colours(frame: VideoFrame, path: Path) -> None:
    if frame.color_trc in _HDR:
        kind = _HDR[ColorTrc(frame.color_trc)]
        raise PrflError(f"is HDR video ({kind}), and prfl reads SDR alone", where=str(path), fix=TO_SDR)
    if frame.colorspace not in _CONVERTED:
        what = f"has a colour matrix (number {frame.colorspace} of H.273) that prfl does not read"
        raise PrflError(what, where=str(path), fix=TO_SDR)


def _display_matrix(frame: VideoFrame) -> tuple[float, float, float, float]:
    try:
        side_data = cast(SideDataContainer, frame.side_data)  # PyAV's own types know two of its kinds alone
        data = np.frombuffer(bytes(side_data[Type.DISPLAYMATRIX]), np.int32)
        a, b, c, d = data[[0, 1, 3, 4]].astype(float).tolist()
        return (a, b, c, d) if a or b else (1.0, 0.0, 0.0, 1.0)
    except KeyError:
        return 1.0, 0.0, 0.0, 1.0
    except ValueError:  # among the side data is something that this PyAV has no name for
        turned = math.radians(frame.rotation)  # counter-clockwise
        return math.cos(turned), -math.sin(turned), math.sin(turned), math.cos(turned)
