"""What is CogVideoX's alone: its sigmas, its decoder in groups of frames, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from prfl.backbone import load_architecture, load_backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.cogvideox.model import CogVideoXBackbone
from prfl.backbone.cogvideox.vae import frame_groups
from prfl.backbone.frames import pixel_frames
from prfl.backbone.kernels import cheaper_calls, use_kernels
from prfl.rollout.flow import chain_sigmas
from prfl.rollout.solvers import euler
from prfl.utils.errors import PrflError
from tests.cogvideox import SHAPE, save_tiny_cogvideox


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_cogvideox(tmp_path_factory.mktemp("models") / "cog")


@pytest.fixture
def model(folder: Path) -> CogVideoXBackbone:
    return load_backbone(folder)


def noise(batch: int = 1) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_a_shift_gives_a_flows_sigmas(model: CogVideoXBackbone) -> None:
    own, shifted = model.sigmas(10, SHAPE), model.sigmas(10, SHAPE, shift=model.facts.shift)
    assert own[0] == shifted[0] == 1 and own[-1] == shifted[-1] == 0 and bool((own.diff() < 0).all())
    assert float((own - shifted).abs()[:6].max()) < 0.01, "the family's own shift is like its table above its middle"
    assert torch.equal(shifted, chain_sigmas(10, model.facts.shift))
    with pytest.raises(PrflError, match="2000 steps, and the model has 1000 timesteps"):
        model.sigmas(2000, SHAPE)


# ------------------------------------------------------------------------------------------------- the VAE


def test_groups_of_frames() -> None:
    assert frame_groups(1, 2) == [(0, 1)] and frame_groups(3, 2) == [(0, 3)]
    assert frame_groups(7, 2) == [(0, 3), (3, 5), (5, 7)] and frame_groups(4, 2) == [(0, 2), (2, 4)]


def test_encoding_is_diffusers_own(model: CogVideoXBackbone) -> None:
    pixels = torch.rand(1, 3, 17, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = model.vae.encode(pixels).latent_dist.mode() * 0.7
    assert torch.equal(model.encode(pixels), expected) and expected.shape == (1, 4, 5, 4, 4)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("shown", [[1], [3], [0, 4], [4], None], ids=str)
def test_decoding_the_frames_that_are_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, shown: list[int] | None, checkpointing: str
) -> None:
    """Pixels and gradient are those of the whole video; no group behind them is decoded, nor a graph kept before."""
    model = load_backbone(folder, torch.float64)
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    latents = torch.randn(1, 4, 7, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = list(range(7)) if shown is None else shown
    frames = pixel_frames(chosen, 4)

    whole = latents.clone().requires_grad_()
    expected = model.vae.decode(whole / 0.7).sample[:, :, frames]
    (gradient,) = torch.autograd.grad(expected.sin().sum(), whole)
    groups: list[tuple[int, bool]] = []
    decode = model.vae.decoder.forward

    def counted(part: Tensor, **more: object) -> object:
        groups.append((part.shape[2], torch.is_grad_enabled()))
        return decode(part, **more)

    monkeypatch.setattr(model.vae.decoder, "forward", counted)
    leaf = latents.clone().requires_grad_()
    pixels = model.decode(leaf, shown)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-12)
    (ours,) = torch.autograd.grad(pixels.sin().sum(), leaf)
    torch.testing.assert_close(ours[:, :, chosen], gradient[:, :, chosen], rtol=0, atol=1e-12)
    others = [frame for frame in range(7) if frame not in chosen]
    assert not ours[:, :, others].any() and ours.abs().max() > 0

    reached = [(first, end) for first, end in frame_groups(7, 2) if first <= chosen[-1]]
    assert groups == [(end - first, end > chosen[0]) for first, end in reached]


def test_sizes(model: CogVideoXBackbone) -> None:
    assert model.latent_shape(9, 16, 24) == (4, 3, 4, 6) and model.latent_shape(1, 8, 8) == (4, 1, 2, 2)
    for frames in (5, 8, 13):
        with pytest.raises(PrflError, match="1 frame and then groups of 8"):
            model.latent_shape(frames, 16, 16)
    with pytest.raises(PrflError, match="multiple of 8.*\n?.*take 8 or 16"):
        model.latent_shape(9, 12, 16)
    with pytest.raises(PrflError, match="4 latent frames: the VAE decodes 1 and then pairs"):
        model.decode(torch.zeros(1, 4, 4, 4, 4))


# ------------------------------------------------------------------------------------------------- files and refusals


def test_the_architecture_ships() -> None:
    """1.69 billion parameters in the transformer, 4.76 in the encoder."""
    model = load_architecture("THUDM/CogVideoX-2b", torch.bfloat16)
    assert sum(p.numel() for p in model.networks["transformer"].parameters()) == 1_693_783_872
    assert sum(p.numel() for p in model.text.encoder().parameters()) == 4_762_310_656
    assert model.latent_shape(49, 480, 720) == (16, 13, 60, 90) and model.facts.text_tokens == 226
    assert model.facts.tokens((16, 13, 60, 90)) == 17_550


def edited(folder: Path, target: Path, part: str, **changes: object) -> Path:
    path = Path(shutil.copytree(folder, target)) / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_what_is_refused(model: CogVideoXBackbone, folder: Path, tmp_path: Path) -> None:
    scheduler = edited(folder, tmp_path / "a", "scheduler/scheduler_config.json", timestep_spacing="leading")
    with pytest.raises(PrflError, match="the scheduler's timestep_spacing is 'leading'"):
        load_backbone(scheduler)
    image = edited(folder, tmp_path / "b", "model_index.json", _class_name="CogVideoXImageToVideoPipeline")
    with pytest.raises(
        PrflError, match="CogVideoXImageToVideoPipeline is not supported.*\n?.*WanPipeline,.* CogVideoX"
    ):
        load_backbone(image)
    with pytest.raises(PrflError, match="CogVideoX 1.5"):
        load_architecture(edited(folder, tmp_path / "c", "transformer/config.json", patch_size_t=2))
    with pytest.raises(PrflError, match="prfl_kernels has nothing for a cogvideox model"):
        use_kernels(model, ["lora_linear"])
    with pytest.raises(PrflError, match="no cheaper calls"):
        cheaper_calls(model, Cheaper(cache=0.1))


def test_the_vae_keeps_its_dtype(folder: Path) -> None:
    model = load_backbone(folder, torch.bfloat16)
    assert isinstance(model.networks["vae"], AutoencoderKLCogVideoX) and model.facts.vae_dtype == torch.float32
    latents = noise().bfloat16()
    assert model.decode(latents).dtype == torch.float32
    exact = load_backbone(folder).velocity(noise(), torch.tensor(0.5), (condition := model.condition(["a"])))
    rounded = model.velocity(noise(), torch.tensor(0.5), condition)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert euler(model.sigmas(2, SHAPE)).steps == 2
