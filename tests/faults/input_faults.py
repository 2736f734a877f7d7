"""Malformed input: videos and manifests."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import torch

from prfl.data.video import write_video
from tests.faults.planting import fault


@fault("a truncated video", "clips/0.mp4: cannot be decoded", "skip_unreadable")
def _(bench):
    data = Path("clips/0.mp4").read_bytes()
    Path("clips/0.mp4").write_bytes(data[: len(data) // 2])
    return bench.cli("train", "reward.yaml")


@fault("an empty video", "clips/0.mp4: cannot be decoded", "mend or remove")
def _(bench):
    Path("clips/0.mp4").write_bytes(b"")
    return bench.cli("train", "reward.yaml")


@fault("a file with the wrong extension", "'.txt' is no video suffix", "clips/0.txt")
def _(bench):
    Path("clips/0.mp4").rename("clips/0.txt")
    bench.rows(lambda rows: rows[0].update(video="clips/0.txt"))
    return bench.cli("train", "reward.yaml", "data.cache=cache/new")


@fault("a playlist called .mp4", "clips/0.mp4: cannot be decoded")
def _(bench):
    Path("clips/0.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n1.mp4\n#EXT-X-ENDLIST\n")
    return bench.cli("train", "reward.yaml")


@fault("a video of 65535 x 65535", "clips/0.gif: ")
def _(bench):
    write_video("clips/0.gif", torch.rand(3, 5, 16, 16), 8)
    data = bytearray(Path("clips/0.gif").read_bytes())
    data[6:10] = b"\xff\xff\xff\xff"
    Path("clips/0.gif").write_bytes(bytes(data))
    bench.rows(lambda rows: rows[0].update(video="clips/0.gif"))
    return bench.cli("train", "reward.yaml")


def patch_header(box: bytes, offset: int, *numbers: int) -> None:
    """Overwrite big-endian 32-bit numbers in the first box of that name in clips/0.mp4."""
    data = bytearray(Path("clips/0.mp4").read_bytes())
    at = data.index(box) + offset
    data[at : at + 4 * len(numbers)] = struct.pack(f">{len(numbers)}I", *numbers)
    Path("clips/0.mp4").write_bytes(bytes(data))


@fault("a header that claims a million pictures", "clips/0.mp4: holds no pictures", "mend or remove")
def _(bench):
    patch_header(b"stsz", 12, 1_000_000)
    return bench.cli("train", "reward.yaml")


@fault("a header that claims a shape beyond reason", "clips/0.mp4: claims that its pixels", "mend or remove")
def _(bench):
    patch_header(b"tkhd", 80, 0x86A00000, 0xFFFF0000)
    return bench.cli("train", "reward.yaml")


@fault("a broken JSON line", "manifest.jsonl:5: is not JSON", "one JSON object on each line")
def _(bench):
    with open("manifest.jsonl", "a") as file:
        file.write('{"video": "clips/0.mp4", ')
    return bench.cli("train", "reward.yaml")


@fault("a path that leaves the manifest's folder", "'../secret.mp4' leaves the manifest's folder", "move the file")
def _(bench):
    shutil.copy("clips/0.mp4", "../secret.mp4")
    bench.rows(lambda rows: rows[0].update(video="../secret.mp4"))
    return bench.cli("train", "reward.yaml")


@fault("a link that leaves the manifest's folder", "manifest.jsonl:1: 'clips/link.mp4' leaves", "a folder above it")
def _(bench):
    shutil.copy("clips/0.mp4", "../secret.mp4")
    os.symlink(Path("../secret.mp4").absolute(), "clips/link.mp4")
    bench.rows(lambda rows: rows[0].update(video="clips/link.mp4"))
    return bench.cli("train", "reward.yaml")


@fault("a video that is not there", "manifest.jsonl:1: no such file: clips/9.mp4", "relative to")
def _(bench):
    bench.rows(lambda rows: rows[0].update(video="clips/9.mp4"))
    return bench.cli("train", "reward.yaml")
