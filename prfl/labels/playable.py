"""Videos as a browser plays them: the file itself where it can, else a copy that it can."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prfl.data.video import cut_video, find_stretches
from prfl.evaluation.media import browser_mp4_of
from prfl.utils.decoding import aspect, decoded, opened, orientation, readable, video_stream
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write
from prfl.utils.video_size import VideoSize

CODECS = {".mp4": ("h264", "vp9", "av1"), ".m4v": ("h264",), ".webm": ("vp8", "vp9", "av1")}
"""What the browsers of today all play, by suffix; with the colours of PIXELS."""
PIXELS = ("yuv420p", "yuvj420p")
MOST_FPS = 120.0


@dataclass(frozen=True)
class Facts:
    """A video's size as it is shown, its pictures a second, and whether browsers play the file."""

    height: int
    width: int
    fps: float
    plays: bool


def facts_of(path: Path) -> Facts:
    """Read a file's header and first picture.  Raises PrflError where it is no video that prfl reads."""
    with readable(path), opened(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "NONE"  # for one picture, threads cost more than they save
        fps = min(float(stream.average_rate or stream.guessed_rate or 24), MOST_FPS)
        codec, pixel_aspect = stream.codec_context.name, aspect(stream, path)
        first = next(decoded(container, stream, path), None)
        if first is None:
            raise PrflError("holds no pictures", where=str(path), fix="download or encode it again")
        frame = first.frame
        height, width = frame.height, round(frame.width * pixel_aspect)
        transposed, _, _ = orientation(frame, path)
        plays = codec in _codecs(path) and frame.format.name in PIXELS
        return Facts(*((width, height) if transposed else (height, width)), fps, plays)


def _codecs(path: Path) -> tuple[str, ...]:
    """Codecs as PyAV names their decoders; libdav1d and libvpx decode AV1 and VP9 in some builds."""
    names = CODECS.get(path.suffix.lower(), ())
    decoders = {"av1": ("av1", "libdav1d"), "vp9": ("vp9", "libvpx-vp9"), "vp8": ("vp8", "libvpx")}
    return tuple(decoder for name in names for decoder in decoders.get(name, (name,)))


def playable(path: Path, facts: Facts, copy: Path) -> Path:
    """Return the file itself where browsers play it, else ``copy``, written where it is absent or older.

    A copy is H.264 at the video's own size and rate, without sound.  Raises PrflError where it cannot be read whole.
    """
    if facts.plays:
        return path
    if not copy.is_file() or copy.stat().st_mtime_ns < path.stat().st_mtime_ns:
        numbers = find_stretches(path, frames=1, fps=facts.fps).numbers
        pictures = cut_video(path, numbers, VideoSize(1, facts.height, facts.width, facts.fps))
        content = browser_mp4_of(pictures, facts.fps)
        with atomic_write(copy) as temporary:
            temporary.write_bytes(content)
    return copy
