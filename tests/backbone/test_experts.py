"""Wan 2.2 A14B: which of two networks computes what, alone, in a batch of both, under dropout and checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from prfl.backbone import LoraSpec, load_architecture, load_backbone
from prfl.backbone.cheaper import Cheaper
from prfl.backbone.experts import is_high
from prfl.backbone.wan.experts import WanExpertsBackbone
from prfl.factory.reward import load_reward
from prfl.reward import LatentReward, RewardHead
from prfl.rollout.guidance import guided_network
from prfl.rollout.solvers import euler
from prfl.rollout.trajectory import rollout
from prfl.utils.errors import PrflError
from prfl.utils.schedule import chain_sigmas
from tests.objective.parts import PROMPTS, stir
from tests.tiny import tiny_transformer
from tests.wan_experts import BOUNDARY, save_tiny_experts
from tests.wan_image import SHAPE

MIXED = torch.tensor([0.3, 0.9, 0.5])
TIE = 3  # the node of a chain of 10 steps at shift 3 that lies on the boundary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_experts(tmp_path_factory.mktemp("models") / "tiny-a14b")


@pytest.fixture
def model(folder: Path) -> WanExpertsBackbone:
    backbone = load_backbone(folder)
    assert isinstance(backbone, WanExpertsBackbone)
    return backbone


def noise(batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ran(model: WanExpertsBackbone) -> list[str]:
    """The networks whose first block has run, call by call."""
    names: list[str] = []
    for name in model.facts.blocks:
        model.networks[name].blocks[0].register_forward_hook(lambda *_, name=name: names.append(name))
    return names


def test_a_tie_is_decided_as_by_the_pipeline(model: WanExpertsBackbone, folder: Path, ran: list[str]) -> None:
    sigmas = chain_sigmas(10, 3.0)
    assert float(sigmas[TIE]) < BOUNDARY and is_high(model.facts, sigmas).tolist() == [True] * (TIE + 1) + [False] * 7
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    set_timesteps = pipe.scheduler.set_timesteps

    def set_ours(steps: int, device: object) -> None:
        set_timesteps(steps, device=device)
        pipe.scheduler.sigmas, pipe.scheduler.timesteps = sigmas.float(), sigmas[:-1].float() * 1000

    pipe.scheduler.set_timesteps = set_ours
    how = dict(height=16, width=16, num_frames=9, num_inference_steps=10, max_sequence_length=512)
    for scale in (1.0, 3.0):
        theirs = pipe(PROMPTS[0], **how, guidance_scale=scale, latents=noise(), output_type="latent").frames
        condition, empty = model.condition(PROMPTS[:1]), model.condition([""])
        network = guided_network(model.velocity, condition, empty, scale=scale, gradient="both")
        ran.clear()
        ours = rollout(network, noise(), euler(sigmas)).at(10)
        calls = 1 if scale == 1 else 2
        assert ran == ["transformer"] * calls * (TIE + 1) + ["transformer_2"] * calls * (9 - TIE)
        assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


def test_a_batch_on_both_sides_is_two_calls_put_together(model: WanExpertsBackbone, ran: list[str]) -> None:
    latents, sigma = noise(3), torch.tensor([0.3, BOUNDARY, 0.5])
    condition = model.condition(PROMPTS)
    features = model.features(latents, sigma, condition, [1, 0])
    assert ran == ["transformer", "transformer_2"]
    for row in range(3):
        alone = model.features(latents[row : row + 1], sigma[row], condition[[row]], [1, 0])
        for together, state in zip(features, alone, strict=True):
            torch.testing.assert_close(together[row : row + 1], state, rtol=1e-5, atol=1e-5)


def adapted(folder: Path, checkpointing: str, dropout: float = 0.0) -> WanExpertsBackbone:
    model = load_backbone(folder, torch.float64)
    assert isinstance(model, WanExpertsBackbone)
    model.running.checkpointing = checkpointing  # type: ignore[assignment]
    model.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q", "to_v"], dropout=dropout))
    stir(model, "policy", seed=3)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_a_batch_on_both_sides_are_those_of_its_samples(folder: Path, dropout: float) -> None:
    """Checkpointed blocks and heads are computed again by the network that computed, with each sample's own masks."""
    together, alone = (adapted(folder, checkpointing, dropout) for checkpointing in ("full", "none"))
    latents, seeds, condition = noise(3).double(), torch.tensor([5, 6, 7]), together.condition(PROMPTS)
    with together.adapter("policy", seeds):
        together.velocity(latents, MIXED, condition).sin().sum().backward()
    for row in range(3):
        with alone.adapter("policy", seeds[row : row + 1]):
            alone.velocity(latents[row : row + 1], MIXED[row], condition[[row]]).sin().sum().backward()
    for name, parameter in alone.parameters("policy").items():
        assert parameter.grad is not None and parameter.grad.any(), name
        ours = together.parameters("policy")[name].grad  # norms and embeddings of time are in float32
        torch.testing.assert_close(
            ours, parameter.grad, rtol=0, atol=1e-5 * float(parameter.grad.abs().max()), msg=name
        )
    if dropout:
        with together.adapter("policy"):
            plain = together.velocity(latents, MIXED, condition)
        with together.adapter("policy", seeds):
            assert not torch.equal(plain, together.velocity(latents, MIXED, condition)), "dropout does something"


def test_a_call_of_one_network_leaves_the_others_gradient_none(folder: Path) -> None:
    model = adapted(folder, "full")
    with model.adapter("policy"):
        model.velocity(noise().double(), torch.tensor(0.9), model.condition(PROMPTS[:1])).sum().backward()
    absent = {name.startswith("transformer_2.") for name, p in model.parameters("policy").items() if p.grad is None}
    there = {name.startswith("transformer_2.") for name, p in model.parameters("policy").items() if p.grad is not None}
    assert absent == {True} and there == {False}


def test_kernels_are_swapped_in_both(model: WanExpertsBackbone) -> None:
    condition = model.condition(PROMPTS)
    plain = model.velocity(noise(3), MIXED, condition)
    model.use_kernels()
    assert {type(network.blocks[0]).__name__ for network in model.computing.values()} == {"KernelBlock"}
    torch.testing.assert_close(model.velocity(noise(3), MIXED, condition), plain, rtol=0, atol=1e-5)


def test_cheaper_calls_take_nothing_over_from_the_other_network(model: WanExpertsBackbone) -> None:
    """A cache that skips whatever it may: at the boundary there is nothing yet that it could take."""
    condition, latents = model.condition(PROMPTS[:1]), noise()
    calls = model.cheaper(Cheaper(cache=1e9, products="float8"))
    with torch.no_grad():
        for sigma in (1.0, 0.9, 0.8, 0.7):
            with calls.at(0):
                found = model.velocity(latents, torch.tensor(sigma), condition)
            if sigma == 0.8:
                beginning = model.cheaper(Cheaper(products="float8"))
                with beginning.at(0):
                    assert torch.equal(found, model.velocity(latents, torch.tensor(sigma), condition))
    assert calls.cached == 0.5  # the second call of each


# ------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_ratio": None}, "need a boundary_ratio between 0 and 1: it is None"),
        ({"boundary_ratio": 1.5}, "need a boundary_ratio between 0 and 1: it is 1.5"),
        ({"transformer_2": [None, None]}, "of 0.875 is for two transformers, and there is no transformer_2"),
    ],
)
def test_two_transformers_and_their_boundary_belong_together(tmp_path: Path, change: dict, message: str) -> None:
    index = {"_class_name": "WanPipeline", "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875, **change}))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps({"shift": 3.0}))
    with pytest.raises(PrflError, match=message):
        load_architecture(tmp_path)


def test_transformers_of_two_models_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    tiny_transformer(num_layers=2).save_pretrained(other / "transformer_2")
    with pytest.raises(PrflError, match="the two transformers differ in num_layers: 3 and 2"):
        load_backbone(other)


def test_the_shipped_architecture_is_two_of_14_billion() -> None:
    model = load_architecture("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch.bfloat16)
    sizes = [sum(p.numel() for p in model.networks[name].parameters()) for name in model.facts.blocks]
    assert sizes == [14_288_491_584] * 2 and model.facts.boundary == 0.875 and model.facts.num_blocks == 40


def test_a_head_of_one_expert_is_not_the_others(folder: Path, tmp_path: Path) -> None:
    """Nor one of the same experts that take turns at another noise level."""
    model = load_backbone(folder)
    head = RewardHead(model.facts.width_after([1]), ["motion"], inner=16, heads=2, hidden=16)
    LatentReward(head, model, [1]).freeze().save_pretrained(tmp_path / "reward")
    assert load_reward(tmp_path / "reward", load_backbone(folder)).dimensions == ("motion",)
    exchanged, moved = (shutil.copytree(folder, tmp_path / name) for name in ("exchanged", "moved"))
    for name, other in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        shutil.copytree(folder / other, exchanged / name, dirs_exist_ok=True)
    index = json.loads((moved / "model_index.json").read_text())
    (moved / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.9}))
    for place, what in ((exchanged, "transformer_2_fingerprint"), (moved, "boundary")):
        with pytest.raises(PrflError, match=what):
            load_reward(tmp_path / "reward", load_backbone(place))
