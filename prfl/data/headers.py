"""Read a video's size, rate and length from its header.  A header may be wrong, so it is used only to propose sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from prfl.utils.decoding import opened, readable, video_stream


class Header(NamedTuple):
    """Pixels, pictures a second, and seconds of a video."""

    height: int
    width: int
    fps: float
    seconds: float


def read_header(path: Path) -> Header:
    """Read a file's header; no picture is decoded.  Raises PrflError for a file that is no video."""
    with readable(path), opened(path) as container:
        stream = video_stream(container, path)
        fps = float(stream.average_rate or 0)
        time_base = float(stream.time_base or 0)
        seconds = stream.duration * time_base if stream.duration else (container.duration or 0) / 1e6
        return Header(stream.height, stream.width, fps, seconds)


def typical(headers: Sequence[Header]) -> Header:
    """Summarise headers: the median size and rate, and a length that nine of ten videos reach."""
    seconds = sorted(header.seconds for header in headers)
    return Header(
        int(median(header.height for header in headers)),
        int(median(header.width for header in headers)),
        median(header.fps for header in headers),
        seconds[len(seconds) // 10],
    )
