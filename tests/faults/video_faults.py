"""Real folders: which files are videos, which are a user's, and where a link leads."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import numpy as np
from av.video.reformatter import ColorTrc

from prfl.utils.files import CACHE_TAG, mark_written
from tests.data.files_as_they_are import encode, patch, set_display_matrix
from tests.faults.planting import Bench, fault

CLIP = Path("clips/0.mp4")
PICTURES = [np.full((16, 16, 3), 40 * index, np.uint8) for index in range(5)]


def cut(bench: Bench, videos: str, *others: str) -> str:
    """The cache of clips that are cut from these videos."""
    generator = f"data.generator={{name: video_clips, videos: {videos}}}"
    return bench.cli("cache", "sft.yaml", "data.manifest=null", generator, *others)


def linked(name: str) -> None:
    """A video behind a link out of a folder of videos, as in a snapshot of the hub."""
    Path("snapshot").mkdir()
    shutil.move(CLIP, f"../{name}")
    os.symlink(Path(f"../{name}").absolute(), "snapshot/a.mp4")


@fault("a codec that this build lacks", "clips/0.mp4: is of a codec that this FFmpeg", "mend or remove")
def _(bench: Bench) -> str:
    CLIP.write_bytes(CLIP.read_bytes().replace(b"avc1", b"evc1"))
    return bench.cli("train", "reward.yaml")


@fault("HDR10", "clips/0.mp4: is HDR video (PQ, as HDR10 has it), and prfl reads SDR alone", "mend or remove")
def _(bench: Bench) -> str:
    encode(CLIP, PICTURES, color_trc=ColorTrc.SMPTE2084, color_primaries=9, colorspace=9)
    return bench.cli("train", "reward.yaml")


@fault("HLG among videos to be cut", "clips/0.mp4: is HDR video (HLG)", "tonemap=hable")
def _(bench: Bench) -> str:
    encode(CLIP, PICTURES, color_trc=ColorTrc.ARIB_STD_B67)
    return cut(bench, "clips")


@fault("a colour matrix that is not converted", "clips/0.mp4: has a colour matrix (number 8 of H.273)")
def _(bench: Bench) -> str:
    encode(CLIP, PICTURES, pixels="yuv444p", colorspace=8)
    return bench.cli("train", "reward.yaml")


@fault("a display matrix that turns by 37 degrees", "clips/0.mp4: is to be shown turned by 37 degrees")
def _(bench: Bench) -> str:
    set_display_matrix(CLIP, 0.8, 0.6, -0.6, 0.8)
    return bench.cli("train", "reward.yaml")


@fault("a length of years in two kilobytes", "0 clips of 5 frames at 8 fps fit into the videos (1)", "longer videos")
def _(bench: Bench) -> str:
    patch(CLIP, b"mdhd", 16, struct.pack(">I", 16))
    patch(CLIP, b"stts", 12, struct.pack(">II", 5, 2**30))
    return cut(bench, str(CLIP))


@fault("videos in a folder that prfl wrote", "clips: lies in", "clips, which prfl wrote", "your own videos")
def _(bench: Bench) -> str:
    mark_written(Path("clips"), CACHE_TAG)
    return cut(bench, "clips")


@fault("a run's samples as videos", "runs/sft/samples: lies in", "which prfl wrote", "your own videos")
def _(bench: Bench) -> str:
    shutil.copytree("clips", "runs/sft/samples/step-000002/videos")
    return cut(bench, "runs/sft/samples")


@fault("a folder of hidden files alone", "clips: holds no videos; 4 hidden files (", "give a folder of videos")
def _(bench: Bench) -> str:
    for path in Path("clips").iterdir():
        path.rename(path.with_name(f"._{path.name}"))
    return cut(bench, "clips")


@fault("links to nothing", "cache/in: holds no videos; 2 links to nothing (a.mp4, b.mp4)", "give a folder of videos")
def _(bench: Bench) -> str:
    for name in ("a.mp4", "b.mp4"):
        Path("cache/in").mkdir(exist_ok=True)
        os.symlink("/nowhere/at/all.mp4", f"cache/in/{name}")
    return cut(bench, "cache/in")


@fault("links out of a folder of videos", "snapshot: holds 1 links that lead out", "(a.mp4)", "data.follow_links=true")
def _(bench: Bench) -> str:
    linked("blob")
    return cut(bench, "snapshot")


@fault("a blob that is followed and no video", "snapshot/a.mp4: cannot be decoded", "download or encode it again")
def _(bench: Bench) -> str:
    linked("blob")
    Path("../blob").write_bytes(b"no video")
    return cut(bench, "snapshot", "data.follow_links=true")


@fault("a manifest's path that leaves it, links followed or not", "'../secret.mp4' leaves the manifest's folder")
def _(bench: Bench) -> str:
    shutil.copy(CLIP, "../secret.mp4")
    bench.rows(lambda rows: rows[0].update(video="../secret.mp4"))
    return bench.cli("train", "reward.yaml", "data.follow_links=true")


@fault("a link that leads out of a manifest to be scored", "manifest.jsonl:1: 'clips/link.mp4'", "--follow-links")
def _(bench: Bench) -> str:
    shutil.move(CLIP, "../far.mp4")
    os.symlink(Path("../far.mp4").absolute(), "clips/link.mp4")
    bench.rows(lambda rows: rows[0].update(video="clips/link.mp4"))
    return bench.cli("score", "manifest.jsonl", "--head", "heads/latent")
