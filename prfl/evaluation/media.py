"""Videos that any browser plays, as bytes: H.264 with 4:2:0 colour, small ones enlarged so that a person sees them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def enlarge(pixels: Float[Tensor, "3 f h w"], smallest_side: int) -> Float[Tensor, "3 f H W"]:
    """Repeat each pixel a whole number of times (no blur) until the short side has at least ``smallest_side``."""
    times = max(1, math.ceil(smallest_side / min(pixels.shape[2:])))
    return pixels.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)


def grid(
    groups: Sequence[Sequence[Float[Tensor, "3 f h w"]]], *, gap: int = 4, longest_side: int = 1920
) -> Float[Tensor, "3 f H W"]:
    """Lay out many videos of one size as one, on grey.

    The videos of a group are side by side, groups in a block of about a screen's shape.  Every video is shrunk where
    the whole would pass ``longest_side``.
    """
    beside, (frames, height, width) = len(groups[0]), groups[0][0].shape[1:]

    # Columns and rows of groups.
    screen = 16 / 9
    across = min(len(groups), max(1, round(math.sqrt(screen * len(groups) * height / (width * beside)))))
    down = math.ceil(len(groups) / across)

    # The size of each video.
    room = [(longest_side - count * gap) / count for count in (across, down)]
    scale = min(1.0, room[0] / (beside * width), room[1] / height)
    height, width = (max(2, int(side * scale)) for side in (height, width))

    canvas = torch.zeros(3, frames, down * (height + gap) - gap, across * (beside * width + gap) - gap)
    for number, group in enumerate(groups):
        top, left = number // across * (height + gap), number % across * (beside * width + gap)
        for column, video in enumerate(group):
            pictures = video.transpose(0, 1)
            if scale < 1:
                pictures = F.interpolate(pictures, (height, width), mode="bilinear", antialias=True)
            start = left + column * width
            canvas[:, :, top : top + height, start : start + width] = pictures.transpose(0, 1)
    return canvas


def browser_mp4(pixels: Float[Tensor, "3 f h w"], fps: float, smallest_side: int = 192) -> bytes:
    """Encode pixels in [-1, 1] (clamped) as an mp4 with tagged colours: people see what was sampled.

    4:2:0 needs even sides: an odd last row or column is dropped.
    """
    return browser_mp4_of([pixels], fps, smallest_side)


def browser_mp4_of(parts: Iterable[Float[Tensor, "3 f h w"]], fps: float, smallest_side: int = 192) -> bytes:
    """Encode a video as ``browser_mp4`` does, of parts of one size that follow each other: a long one is never whole.

    Raises ValueError where there are none.
    """
    import av
    from av.video.stream import VideoStream

    from prfl.data.video import in_colours_of, tag_colours

    buffer = io.BytesIO()
    stream: VideoStream | None = None
    with av.open(buffer, "w", format="mp4") as container:
        for part in parts:
            pixels = enlarge(part.detach().float().cpu(), smallest_side)
            height, width = (size // 2 * 2 for size in pixels.shape[2:])
            if stream is None:
                options = {"crf": "18", "preset": "medium", "threads": "1"}
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                tag_colours(stream)

            levels = (pixels[:, :, :height, :width].clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
            for picture in levels.permute(1, 2, 3, 0).contiguous().numpy():
                container.mux(stream.encode(in_colours_of(stream, picture)))
        if stream is None:
            raise ValueError("a video has one part at least")
        container.mux(stream.encode(None))
    return buffer.getvalue()
