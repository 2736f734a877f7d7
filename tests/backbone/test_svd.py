"""Stable Video Diffusion alone: what is made of a picture, noise levels, and what it does not take."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from prfl.backbone import Ask, load_architecture, load_backbone
from prfl.backbone.condition import EMBEDS, LENGTHS
from prfl.backbone.first_frame import FRAME, FirstFrameTold
from prfl.backbone.guidance_scale import ScaleOfFrames
from prfl.backbone.svd.family import SVD
from prfl.backbone.svd.model import ADDED, SvdBackbone
from prfl.rollout.sampling import SamplingSettings, sample
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize
from tests.svd import SHAPE, save_tiny_svd
from tests.wan_image import first_frames

CLIP = VideoSize(3, 16, 16, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_svd(tmp_path_factory.mktemp("models") / "tiny-svd")


@pytest.fixture
def model(folder: Path) -> SvdBackbone:
    return load_backbone(folder)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    return first_frames(tmp_path / "pictures", ["a red circle"], CLIP)[0]


@pytest.mark.parametrize("told", [FirstFrameTold(), FirstFrameTold(60.0, 0.5)])
def test_a_picture_is_encoded_as_by_the_pipeline(
    model: SvdBackbone, folder: Path, ask: Ask, told: FirstFrameTold
) -> None:
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder)
    model.condition([ask])  # told what it is by itself
    model.tell(told)
    picture = Image.open(ask.image)
    condition = model.condition([ask, ask.unconditional])
    embeds = pipe._encode_image(picture, "cpu", 1, True).flip(0)
    torch.testing.assert_close(condition.tensors[EMBEDS], embeds, rtol=1e-5, atol=1e-6)
    pixels = pipe.video_processor.preprocess(picture, height=16, width=16)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    latents = pipe._encode_vae_image(pixels + told.noise_aug_strength * noise, "cpu", 1, True).flip(0)
    torch.testing.assert_close(condition.tensors[FRAME], latents, rtol=1e-5, atol=1e-6)
    assert condition.tensors[FRAME][0].abs().max() > 0.01 and not condition.tensors[FRAME][1].any()
    added = [6.0, told.motion_bucket_id, pytest.approx(told.noise_aug_strength)]
    assert condition.tensors[ADDED].tolist() == [added] * 2
    assert condition.tensors[LENGTHS].tolist() == [1, 1]


def test_it_reads_the_picture_and_no_text(model: SvdBackbone, ask: Ask, tmp_path: Path) -> None:
    other = Ask("another caption", ask.image, CLIP)
    slower = Ask(ask.prompt, ask.image, VideoSize(3, 16, 16, 8))
    picture = first_frames(tmp_path / "others", ["", ask.prompt], CLIP)[1]
    noise, sigma = torch.randn(1, *SHAPE), torch.tensor(0.8)
    ours, *others = (model.velocity(noise, sigma, model.condition([each])) for each in (ask, other, slower, picture))
    assert torch.equal(ours, others[0])
    assert all((ours - each).abs().max() > 1e-4 for each in others[1:]), "the rate and the picture are read"
    tokens = model.text.tokens([ask.prompt, "another caption", "a " * 600])
    assert len(set(tokens)) == 3 and {len(each) for each in tokens} == {1}, "prompts stay apart, and none is cut"
    with pytest.raises(PrflError, match="needs a first frame"):
        model.condition(["a red circle"])
    with pytest.raises(PrflError, match="4 x 4 latents, and these are 8 x 8"):
        model.velocity(torch.randn(1, 4, 3, 8, 8), sigma, model.condition([ask]))


def test_noise_levels_are_the_pipelines(model: SvdBackbone, folder: Path) -> None:
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps(25)
    sigmas = model.sigmas(25, SHAPE)
    noise = sigmas / (1 - sigmas)
    torch.testing.assert_close(noise, pipe.scheduler.sigmas.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.path.timestep(sigmas[:-1]).float(), pipe.scheduler.timesteps, rtol=1e-4, atol=1e-5)
    assert float(sigmas[0]) == pytest.approx(700 / 701) and float(sigmas[-1]) == 0
    # Beyond the noise that the model was trained with the network is asked at the nearest.
    ends = model.path.timestep(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == pytest.approx([math.log(0.002) / 4, math.log(700) / 4], rel=1e-4)
    with pytest.raises(PrflError, match=r"ends at sigma 0\.9986"):
        model.sigmas(25, SHAPE, shift=3.0)


def test_frames_are_decoded_in_chunks_as_by_the_pipeline(
    model: SvdBackbone, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prfl.backbone.svd.model.CHUNK", 2)
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder)
    latents = torch.randn(1, 4, 5, 4, 4).requires_grad_()
    whole, some = model.decode(latents), model.decode(latents, [1, 4])
    theirs = pipe.decode_latents(latents.transpose(1, 2), 5, decode_chunk_size=2)
    torch.testing.assert_close(whole, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some, whole[:, :, [1, 4]])
    (gradient,) = torch.autograd.grad(some.sum(), latents)
    assert gradient[:, :, 1].any() and gradient[:, :, 4].any() and not gradient[:, :, [0, 2, 3]].any()
    assert (model.decode(latents[:, :, 1:2]) - some[:, :, :1]).abs().max() > 1e-3, "frames of a chunk see each other"
    two = model.decode(torch.cat([latents, -latents]))
    torch.testing.assert_close(two[:1], whole, rtol=1e-4, atol=1e-5)
    clip = torch.rand(1, 3, 5, 16, 16)
    frames = [model.encode(clip[:, :, [index]]) for index in range(5)]
    torch.testing.assert_close(model.encode(clip), torch.cat(frames, dim=2), rtol=1e-4, atol=1e-5)


def test_a_video_is_drawn_as_by_the_pipelines_defaults(
    model: SvdBackbone, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance from 1 at the first frame to 3 at the last, 7 frames a second: nothing of the call but its size."""
    pipe = StableVideoDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    how = dict(height=16, width=16, num_frames=3, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
    theirs = pipe(Image.open(ask.image), **how, latents=noise.transpose(1, 2).clone(), output_type="latent").frames
    monkeypatch.setattr("prfl.rollout.sampling.start_noise", lambda *inputs: noise)
    settings = SamplingSettings(3, 16, 16, 5, guidance_scale=ScaleOfFrames(1.0, 3.0))
    ours = sample(model, [ask], [0], settings)
    largest = float(theirs.abs().max())
    assert float((ours - theirs.transpose(1, 2)).abs().max()) < 1e-5 * largest
    even = sample(model, [ask], [0], replace(settings, guidance_scale=3.0))
    assert float((even - ours).abs().max()) > 1e-2 * largest, "the first frames differ"


def test_schedulers_that_are_not_euler_on_the_flow(tmp_path: Path) -> None:
    folder = save_tiny_svd(tmp_path / "svd")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "epsilon"}))
    with pytest.raises(PrflError, match="prediction_type is 'epsilon'"):
        load_backbone(folder)


def test_the_shipped_architecture() -> None:
    (hub,) = SVD.shipped
    model = load_architecture(hub, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.networks["unet"].parameters()) == 1_524_623_082
    assert model.latent_shape(25, 576, 1024) == (4, 25, 72, 128)
    assert model.facts.widths == (320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320)
