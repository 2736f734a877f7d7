"""Video files as other programs write them: with tags, display matrices, edit lists and several streams."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

BARS = np.array(
    [[235, 235, 235], [200, 180, 20], [20, 180, 180], [20, 180, 20], [180, 20, 180], [180, 20, 20], [20, 20, 180]],
    np.uint8,
)


def bars(height: int, width: int) -> np.ndarray:
    """(height, width, 3): seven upright bars of colour."""
    return np.broadcast_to(BARS[np.arange(width) * 7 // width], (height, width, 3)).copy()


def encode(
    path: Path,
    pictures: Sequence[np.ndarray],
    *,
    fps: int | Fraction = 8,
    matrix: Colorspace = Colorspace.ITU601,
    times: Sequence[float] | None = None,
    pixels: str = "yuv420p",
    **tags: Any,
) -> None:
    """H.264 of (h, w, 3) uint8 pictures, converted by ``matrix``, whatever the ``tags`` (of the codec) say.

    times: of the pictures in seconds, where they are not 1/fps apart.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "4"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate(pictures):
            frame = VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)
            frame.pts, frame.time_base = (index, 1 / Fraction(fps)) if times is None else (
                round(times[index] * 1000), Fraction(1, 1000),
            )  # fmt: skip
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def patch(path: Path, box: bytes, offset: int, data: bytes) -> None:
    """Overwrite bytes of the first box of that name, ``offset`` behind it."""
    content = bytearray(path.read_bytes())
    at = content.index(box) + offset
    content[at : at + len(data)] = data
    path.write_bytes(bytes(content))


def set_display_matrix(path: Path, a: float, b: float, c: float, d: float) -> None:
    """A stored pixel at (p, q) is shown at (a p + c q, b p + d q)."""
    cells = (a, b, 0, c, d, 0, 0, 0)
    patch(path, b"tkhd", 44, struct.pack(">9i", *(round(cell * 2**16) for cell in cells), 2**30))


def cut_by_edit_list(path: Path, first: int, count: int, fps: int) -> None:
    """Show ``count`` pictures from ``first`` on, as a cut without encoding does; the others stay in the file."""
    content = path.read_bytes()
    (ticks,) = struct.unpack_from(">I", content, content.index(b"mdhd") + 16)
    (start,) = struct.unpack_from(">i", content, content.index(b"elst") + 16)
    (movie,) = struct.unpack_from(">I", content, content.index(b"mvhd") + 16)
    patch(path, b"elst", 12, struct.pack(">Ii", count * movie // fps, start + first * ticks // fps))
