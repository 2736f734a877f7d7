"""Clips of several sizes in one run: each video is read at the size that it fits best (``data.buckets``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prfl.data.manifest import LabelledVideo, PreferencePair, manifest_videos
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

if TYPE_CHECKING:
    from prfl.data.headers import Header

Rows = Sequence[LabelledVideo | PreferencePair]
Clip = tuple[Path, VideoSize]
NEAR = 0.05  # difference of log(height / width) below which cropping one shape to the other loses almost nothing
FASTER = 1.01  # a clip whose rate is above the file's by more than this factor repeats pictures


def once(clips: Sequence[Sequence[Clip]]) -> list[Clip]:
    """List the clips of all rows, once each, in order."""
    return list(dict.fromkeys(clip for of_row in clips for clip in of_row))


@dataclass(frozen=True)
class ClipSizes:
    """The sizes at which videos are read, the largest first.

    by_prompt: all videos of a prompt are read at one size, because they are compared.
    """

    sizes: tuple[VideoSize, ...]
    by_prompt: bool = False

    @staticmethod
    def of(size: VideoSize | ClipSizes) -> ClipSizes:
        """Return ``size`` as a ClipSizes; a single VideoSize becomes the only one."""
        return size if isinstance(size, ClipSizes) else ClipSizes((size,))

    @property
    def largest(self) -> VideoSize:
        return self.sizes[0]

    def clips(self, rows: Rows) -> list[list[Clip]]:
        """List the videos of each row with the size at which they are read."""
        sizes = self.of_rows(rows)
        return [[(video, size) for video in manifest_videos([row])] for row, size in zip(rows, sizes, strict=True)]

    def of_rows(self, rows: Rows) -> list[VideoSize]:
        """Choose the size of each row's videos."""
        if len(self.sizes) == 1:
            return [self.largest] * len(rows)
        together: dict[object, list[LabelledVideo | PreferencePair]] = {}
        for number, row in enumerate(rows):
            together.setdefault(row.prompt if self.by_prompt else number, []).append(row)
        chosen = {key: best_size(manifest_videos(members), self.sizes) for key, members in together.items()}
        return [chosen[row.prompt if self.by_prompt else number] for number, row in enumerate(rows)]


def best_size(videos: Sequence[Path], sizes: Sequence[VideoSize]) -> VideoSize:
    """Choose one size for videos that must all be read at the same size.

    A size fits if the shortest video is long enough for it; among these, sizes whose rate is not above the slowest
    video's are preferred.  Of the sizes left, take the one nearest in shape (height / width) to the first video; of
    equally near ones, the one with the most pixels.  If every size is too long, take the size of the shortest duration.
    """
    headers = [header for video in videos if (header := known_header(video))]
    if not headers:  # no header can be read: the error is raised where the videos are read
        return sizes[0]
    seconds, fps = min(header.seconds for header in headers), min(header.fps for header in headers)
    filled = [size for size in sizes if (size.frames - 1) / size.fps <= seconds]
    slow = [size for size in filled if size.fps <= fps * FASTER] or filled
    if not slow:
        return min(sizes, key=lambda size: (size.frames - 1) / size.fps)
    shape = math.log(headers[0].height / headers[0].width)
    apart = {size: round(abs(math.log(size.height / size.width) - shape) / NEAR) for size in slow}
    return min(slow, key=lambda size: (apart[size], -size.frames * size.height * size.width))


@lru_cache(maxsize=2**17)
def known_header(video: Path) -> Header | None:
    """Read a video's header once; None where it cannot be read."""
    from prfl.data.headers import read_header  # it loads PyAV, which a machine without videos need not have

    try:
        return read_header(video)
    except PrflError:
        return None
