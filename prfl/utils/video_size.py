"""The size of a clip, as its files are read and as a model takes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VideoSize:
    """So many frames at fps pictures a second, of height x width pixels."""

    frames: int
    height: int
    width: int
    fps: int | float
