"""The config's generator of labelled samples, as build makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from prfl import build
from prfl.backbone import WanBackbone
from prfl.config import load_config
from prfl.data.manifest import LabelledVideo, read_manifest, write_manifest

REWARD = Path(__file__).parents[2] / "configs/tiny/reward.yaml"


def test_samples_of_several_guidance_scales_are_one_manifest(
    tmp_path: Path, tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    generator = {"name": "shapes_samples", "per_prompt": 2, "steps": 1, "guidance": [1.0, 2.0]}
    raw = yaml.safe_load(REWARD.read_text())
    Path("reward.yaml").write_text(yaml.safe_dump({**raw, "data": {**raw["data"], "generator": generator}}))
    drawn = []

    def few(folder: Path, known: dict, counts: dict, draw: Callable, *rest: object) -> Path:
        draw(["a red circle"], [0])
        (folder / "videos").mkdir(parents=True)
        (folder / "videos/0.mp4").touch()
        write_manifest(folder / "manifest.jsonl", [LabelledVideo(folder / "videos/0.mp4", "a red circle", {}, "train")])
        return folder / "manifest.jsonl"

    monkeypatch.setattr(build.inputs.shapes, "labelled", few)
    monkeypatch.setattr(build.inputs, "decode_all", lambda *_: torch.zeros(1))
    monkeypatch.setattr(build.inputs, "sample", lambda *given: drawn.append(given[3].guidance_scale) or torch.zeros(1))
    path = build.manifest(load_config("reward.yaml"), tiny_backbone, iter)
    folders = {row.video.parents[1].name for row in read_manifest(path) if isinstance(row, LabelledVideo)}
    assert drawn == [1.0, 2.0] and len(folders) == 2
    assert {name.partition("guidance")[2].partition("-")[0] for name in folders} == {"1", "2"}
