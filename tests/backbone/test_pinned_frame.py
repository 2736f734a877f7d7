"""Wan 2.2 TI2V-5B, image to video: a first frame that stands in the latents, at a time of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from prfl.backbone import Ask, load_architecture, load_backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.first_frame import FRAME
from prfl.backbone.wan.pinned_frame import PinnedFrameBackbone
from prfl.rollout.flow import add_noise, velocity_target
from prfl.rollout.solvers import SOLVERS
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from prfl.utils.pictures import read_picture
from tests.wan_image import CLIP, SHAPE, first_frames, save_tiny_pinned_frame

PROMPTS = ["a red circle", "a blue square moves left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pinned_frame(tmp_path_factory.mktemp("models") / "tiny-ti2v")


@pytest.fixture
def model(folder: Path) -> PinnedFrameBackbone:
    backbone = load_backbone(folder)
    assert isinstance(backbone, PinnedFrameBackbone)
    return backbone


@pytest.fixture
def asks(folder: Path) -> list[Ask]:
    return first_frames(folder.parent / "pictures", PROMPTS)


def noise(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_every_chain_ends_at_the_picture(model: PinnedFrameBackbone, asks: list[Ask], solver: str) -> None:
    condition = model.condition(asks)
    frames = torch.cat([model.encode(read_picture(ask.image)[None, :, None]) for ask in asks])
    torch.testing.assert_close(condition.tensors[FRAME], frames)
    schedule = SOLVERS[solver](model.sigmas(4, SHAPE))
    end = rollout(lambda x, sigma: model.velocity(x, sigma, condition), noise(), schedule).at(4)
    torch.testing.assert_close(end[:, :, :1], frames, rtol=0, atol=1e-5)


def test_the_network_sees_the_picture_whatever_the_state_has(model: PinnedFrameBackbone, asks: list[Ask]) -> None:
    condition, sigma = model.condition(asks), torch.tensor([0.3, 0.9])
    state, other = noise(), noise()
    other[:, :, 0] += 1
    leaf = state.clone().requires_grad_()
    (hidden,) = model.features(leaf, sigma, condition, [1])
    assert torch.equal(hidden, model.features(other, sigma, condition, [1])[0])
    ahead, ahead_of_other = (model.velocity(x, sigma, condition)[:, :, 1:] for x in (state, other))
    assert torch.equal(ahead, ahead_of_other)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), leaf)
    assert not gradient[:, :, 0].any() and gradient[:, :, 1:].any()


def test_flow_matching_has_no_loss_in_a_frame_that_is_given(model: PinnedFrameBackbone, asks: list[Ask]) -> None:
    condition, sigma, clean = model.condition(asks), torch.tensor([0.3, 0.9]), noise() * 0.5
    clean[:, :, :1] = condition.tensors[FRAME]
    random = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    error = model.velocity(add_noise(clean, random, sigma), sigma, condition) - velocity_target(clean, random)
    assert error[:, :, 0].abs().max() < 1e-5 < error[:, :, 1:].abs().max()


def test_it_is_finite_at_the_end_of_a_chain(model: PinnedFrameBackbone, asks: list[Ask]) -> None:
    condition, clean = model.condition(asks[:1]), noise(1)
    clean[:, :, :1] = condition.tensors[FRAME]
    velocity = model.velocity(clean, torch.tensor(0.0), condition)
    assert velocity.isfinite().all() and not velocity[:, :, 0].any()


def test_the_kernels_run_it_too(model: PinnedFrameBackbone, asks: list[Ask]) -> None:
    condition, sigma = model.condition(asks), torch.tensor([0.3, 0.9])
    plain = model.velocity(noise(), sigma, condition)
    model.use_kernels()
    torch.testing.assert_close(model.velocity(noise(), sigma, condition), plain, rtol=0, atol=1e-5)


def test_cheaper_calls_that_skip_nothing_are_exact(model: PinnedFrameBackbone, asks: list[Ask]) -> None:
    condition, sigma = model.condition(asks), torch.tensor([0.3, 0.9])
    plain, calls = model.velocity(noise(), sigma, condition), model.cheaper(Cheaper(cache=1e-9))
    with torch.no_grad():
        for node in range(2):
            with calls.at(node):
                near = model.velocity(noise() + 0.1 * node, sigma, condition)
                assert torch.equal(near, plain) == (node == 0)
    assert calls.cached == 0.0


def test_a_folder_of_the_text_pipeline_is_loaded_as_either(tmp_path: Path, folder: Path, asks: list[Ask]) -> None:
    """As the hub's is, whose model_index.json names WanPipeline."""
    text = save_tiny_pinned_frame(tmp_path / "text", pipeline=WanPipeline)
    assert load_backbone(text).facts.takes == {"text"}
    model = load_backbone(text, pipeline="WanImageToVideoPipeline")
    expected = load_backbone(folder).velocity(noise(1), torch.tensor(0.5), load_backbone(folder).condition(asks[:1]))
    torch.testing.assert_close(model.velocity(noise(1), torch.tensor(0.5), model.condition(asks[:1])), expected)
    assert load_architecture(text, pipeline="WanImageToVideoPipeline").facts.family == "wan_pinned_frame"
    with pytest.raises(PrflError, match="a NoPipeline is not supported"):
        load_backbone(text, pipeline="NoPipeline")


def test_what_does_not_fit(model: PinnedFrameBackbone, tmp_path: Path, asks: list[Ask]) -> None:
    with pytest.raises(PrflError, match="needs a first frame"):
        model.condition(PROMPTS)
    with pytest.raises(PrflError, match="a height of 18"):
        model.condition([Ask("a", asks[0].image, replace(CLIP, height=18))])
    with pytest.raises(PrflError, match="4 x 4 latents, and these are 2 x 4"):
        model.velocity(torch.randn(1, 4, 3, 2, 4), torch.tensor(0.5), model.condition(asks[:1]))
    with pytest.raises(PrflError, match="does not take the first frame"):
        load_backbone(save_tiny_pinned_frame(tmp_path / "other", in_channels=12))
