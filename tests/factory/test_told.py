"""What SVD's network is told beside a picture, as a config says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfl.backbone import Ask, load_backbone
from prfl.config.schema import Config
from prfl.data.cache import LatentCache
from prfl.factory.backbone import build_architecture, build_backbone
from prfl.factory.resume_identity import input_contents
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.factory.small_config import small_config
from tests.svd import save_tiny_svd
from tests.wan_image import first_frames

CLIP = VideoSize(3, 16, 16, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_svd(tmp_path_factory.mktemp("models") / "tiny-svd")


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    return first_frames(tmp_path / "pictures", ["a red circle"], CLIP)[0]


def config_of(folder: Path, place: Path, frames: int = 3, **told: float) -> Config:
    return small_config(place, folder, frames=frames, adapter={"rank": 2, "alpha": 2}, first_frame=told)


def test_a_config_says_what_the_network_is_told(folder: Path, tmp_path: Path, ask: Ask) -> None:
    """Conditions are others, and a cache, or a run that goes on, does not take one for the other."""
    plain, moving, noisy = (
        build_backbone(config_of(folder, tmp_path, **told))
        for told in ({}, {"motion_bucket_id": 60}, {"noise_aug_strength": 0.5})
    )
    added, frames = (
        [model.condition([ask]).tensors[name] for model in (plain, moving, noisy)]
        for name in ("added_times", "frame_latents")
    )
    assert [row[0].tolist() for row in added] == [[7.0, 127.0, pytest.approx(0.02)], [7.0, 60.0, pytest.approx(0.02)],
                                                  [7.0, 127.0, pytest.approx(0.5)]]  # fmt: skip
    assert frames[0].equal(frames[1]) and not frames[0].equal(frames[2])
    names = {str(LatentCache.for_backbone(model, tmp_path, CLIP).text) for model in (plain, moving, noisy)}
    assert len(names) == 3
    identity = [LatentCache.for_backbone(model, tmp_path, CLIP).text for model in (plain, load_backbone(folder))]
    assert identity[0] == identity[1], "caches that are there stay"
    key = "backbone.model (text encoder)"
    config = config_of(folder, tmp_path).model_copy(update={"reward": None})
    assert input_contents(config, plain, None)[key] != input_contents(config, moving, None)[key]


def test_other_models_are_told_nothing(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    for build in (build_backbone, build_architecture):
        with pytest.raises(PrflError, match="backbone.first_frame: a wan model is not told of its first frame"):
            build(config_of(tiny_pipeline_folder, tmp_path, 9, motion_bucket_id=60.0))
