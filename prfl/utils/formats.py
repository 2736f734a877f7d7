"""Facts about video files that need no decoder: PyAV is imported only where pictures are read or written.

So a machine that reads no videos, such as one that trains from a cache or runs benchmarks, needs no PyAV.
"""

from __future__ import annotations

from typing import Literal

SUFFIXES = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska", ".gif": "gif"}
"""Readable suffixes; .mp4, .webm and .gif are written."""

Window = Literal["start", "centre"]
"""The part of a longer video that is a clip."""
