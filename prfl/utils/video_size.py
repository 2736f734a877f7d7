"""The size and rate of a clip, as it is read from a file and given to a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoSize:
    """``frames`` pictures of height x width pixels, at ``fps`` pictures per second."""

    frames: int
    height: int
    width: int
    fps: int | float
