"""What is the text-to-video UNet's alone: a chain that neither begins at noise nor ends at data, blocks of several
shapes, frames that are decoded each by itself, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from prfl.backbone import load_architecture, load_backbone
from prfl.backbone.modelscope.model import ModelScopeBackbone
from prfl.backbone.network import base_blocks
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.reward.scorer import PixelScorer
from prfl.rollout.sampling import SamplingSettings, sample
from prfl.utils.errors import PrflError
from tests.backbone.test_cogvideox import edited
from tests.modelscope import SHAPE, save_tiny_modelscope
from tests.tiny import TEXT_WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_modelscope(tmp_path_factory.mktemp("models") / "unet")


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelScopeBackbone:
    return load_backbone(folder)


def noise(batch: int = 1) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_the_chain_is_the_schedulers(model: ModelScopeBackbone, folder: Path, tmp_path: Path) -> None:
    """Leading timesteps 1, 201, ...: it begins below noise, and ends where alphas_cumprod does."""
    a_squared = model.scheduler.alphas_cumprod.double()
    ratio = (1 / a_squared - 1).sqrt()  # b / a
    expected = (ratio / (1 + ratio))[[801, 601, 401, 201, 1, 0]]
    torch.testing.assert_close(model.sigmas(5, SHAPE), expected, rtol=0, atol=1e-12)
    whole = edited(folder, tmp_path / "a", "scheduler/scheduler_config.json", set_alpha_to_one=True)
    assert model.sigmas(5, SHAPE)[-1] > 0.02 and load_backbone(whole).sigmas(5, SHAPE)[-1] == 0
    for steps in (1000, 2000):  # the offset moves the first of 1000 steps out of the table
        with pytest.raises(PrflError, match=f"{steps} steps, and the model has 1000 timesteps"):
            model.sigmas(steps, SHAPE)
    with pytest.raises(PrflError, match="rollout.shift: .*ends at sigma 0.936"):
        model.sigmas(5, SHAPE, shift=3.0)
    velocity = model.velocity(noise(), torch.tensor(1.0), model.condition(["a"]))
    assert velocity.isfinite().all(), "beyond the last timestep it is asked at the last"


def test_what_is_decoded_at_the_chains_end(model: ModelScopeBackbone) -> None:
    """x = (a + b) y: for a person and for a pixel reward alike; a clean prediction is decoded as it is."""
    settings = SamplingSettings(frames=3, height=16, width=16, steps=2)
    latents, condition = sample(model, ["a"], [0], settings), model.condition(["a"])
    torch.manual_seed(0)
    reward = PixelReward(PixelNetwork(TEXT_WIDTH, ["motion"], size=16, hidden=8, inner=16)).freeze()
    scorer, last = PixelScorer(reward, model, seed=0), model.sigmas(2, SHAPE)[-1:]
    on_flow = latents * float((last.square() + (1 - last).square()).sqrt())
    with torch.no_grad():
        seen = reward(model.decode(latents), condition, torch.linspace(0, 1, 3))["motion"]
        torch.testing.assert_close(scorer(on_flow, last, condition, 0)["motion"], seen)
        torch.testing.assert_close(scorer(latents, torch.zeros(1), condition, 0)["motion"], seen)
        assert (scorer(on_flow, torch.zeros(1), condition, 0)["motion"] - seen).abs() > 1e-5


def test_tokens_lie_as_the_frames_do(model: ModelScopeBackbone) -> None:
    """Frame by frame, row by row, of each block at its own size."""
    pictures: list[Tensor] = []
    hook = base_blocks(model)[3].register_forward_hook(lambda module, inputs, output: pictures.append(output))
    (state,) = model.features(noise(2), torch.tensor(0.5), model.condition(["a", "a red"]), [3])
    hook.remove()
    grid = state.reshape(2, 3, 4, 4, 32)
    assert torch.equal(grid[1, 2, 0, 3], pictures[0].reshape(2, 3, 32, 4, 4)[1, 2, :, 0, 3])
    assert [
        state.shape[1] for state in model.features(noise(), torch.tensor(0.5), model.condition(["a"]), range(5))
    ] == [48 // stride**2 for stride in model.facts.strides]


def test_a_head_reads_blocks_of_one_shape(model: ModelScopeBackbone) -> None:
    assert model.facts.usual_block == 2 and model.facts.width_after([1, 2]) == 32
    with pytest.raises(PrflError, match=r"blocks \[0, 1\] have widths \[16, 32\]"):
        model.facts.width_after([0, 1])
    with pytest.raises(PrflError, match=r"a token behind blocks \[2, 3\] is \[1, 2\] latents wide"):
        model.facts.width_after([2, 3])


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_frames_are_coded_one_by_one(folder: Path, checkpointing: str) -> None:
    """Those that are shown and no other; pixels and gradient are those of the whole video."""
    model = load_backbone(folder, torch.float64)
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    whole = noise(2).double().requires_grad_()
    each = [model.vae.decode(whole[:, :, frame] / 0.7).sample for frame in (0, 2)]
    expected = torch.stack(each, dim=2)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), whole)
    leaf = noise(2).double().requires_grad_()
    pixels = model.decode(leaf, [0, 2])
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(pixels.sin().sum(), leaf)[0], gradient, rtol=0, atol=1e-12)
    assert model.decode(leaf).shape == (2, 3, 3, 16, 16) and not gradient[:, :, 1].any()

    latents = model.encode(pixels.detach())
    mean = model.vae.encode(pixels[:, :, 1].detach()).latent_dist.mode() * 0.7
    torch.testing.assert_close(latents[:, :, 1], mean, rtol=0, atol=1e-12)


def test_the_architecture_ships() -> None:
    """1.41 billion parameters in the UNet, 0.34 in the encoder."""
    model = load_architecture("ali-vilab/text-to-video-ms-1.7b", torch.bfloat16)
    assert sum(p.numel() for p in model.networks["unet"].parameters()) == 1_411_233_860
    assert sum(p.numel() for p in model.text.encoder().parameters()) == 340_387_840
    assert model.latent_shape(16, 256, 256) == (4, 16, 32, 32) and model.facts.usual_block == 4
    assert model.facts.widths[4] == 1280 and model.facts.strides == (2, 4, 8, 8, 8, 4, 2, 1, 1)


def test_schedulers_that_are_refused(folder: Path, tmp_path: Path) -> None:
    spacing = edited(folder, tmp_path / "a", "scheduler/scheduler_config.json", timestep_spacing="linspace")
    with pytest.raises(PrflError, match="the scheduler's timestep_spacing is 'linspace'"):
        load_backbone(spacing)
