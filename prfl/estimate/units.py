"""Bytes in words."""

from __future__ import annotations

GIB = 2**30


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
