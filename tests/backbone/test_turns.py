"""Two networks whose frozen weights take turns on the device: the same numbers, and host copies that nobody writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prfl.backbone import Condition, LoraSpec, load_backbone, turns
from prfl.backbone.experts import Experts
from prfl.backbone.network import on_host
from prfl.backbone.turns import Turns
from tests.objective.parts import PROMPTS, stir
from tests.wan_experts import save_tiny_experts, save_tiny_image_experts
from tests.wan_image import SHAPE, first_frames

MIXED = torch.tensor([0.3, 0.9, 0.5])


@pytest.fixture(scope="module", params=[save_tiny_experts, save_tiny_image_experts])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of text, whose blocks are run by prfl's own loop, and of images, whose are run by diffusers'."""
    return request.param(tmp_path_factory.mktemp("models") / "tiny-a14b")


@pytest.fixture
def load(folder: Path) -> Callable[..., Experts]:
    """load(one_resident): a policy under checkpointing."""

    def load(one_resident: bool) -> Experts:
        model = load_backbone(folder, one_resident=one_resident)
        assert isinstance(model, Experts)
        model.running.checkpointing = "full"
        model.add_adapter("policy", LoraSpec(rank=2, alpha=2.0, targets=["to_q", "ffn.net.2"]))
        stir(model, "policy", seed=3)
        return model

    return load


def asked(model: Experts, count: int) -> Condition:
    """The condition of prompts, with pictures where the model takes some."""
    if "image" not in model.facts.takes:
        return model.condition(PROMPTS[:count])
    return model.condition(first_frames(Path(tempfile.mkdtemp()), PROMPTS[:count]))


def turns_of(model: Experts) -> Turns:
    assert model.running.turns is not None
    return model.running.turns


def on_the_device(model: Experts, weight: Tensor) -> bool:
    return weight.data_ptr() in {shared.data_ptr() for shared in turns_of(model).shared.values()}


def weights_seen(model: Experts) -> list[bool]:
    """Of each run of a layer of a block: whether its weight lies in the buffers of the device."""
    seen: list[bool] = []
    for network in (model.networks[name] for name in model.facts.blocks):
        for block in network.blocks:
            layer = block.attn1.to_k
            layer.register_forward_pre_hook(lambda layer, _: seen.append(on_the_device(model, layer.weight)))
    return seen


def trained(model: Experts) -> dict[str, Tensor]:
    """Gradients through both networks: a batch of both, then a call of each whose graphs are alive together."""
    latents = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    condition = asked(model, 3)
    with model.adapter("policy"):
        model.velocity(latents, MIXED, condition).sin().sum().backward()
        high, low = (model.velocity(latents, torch.tensor(sigma), condition).cos().sum() for sigma in (0.95, 0.2))
        high.backward()
        low.backward()
    return {name: parameter.grad for name, parameter in model.parameters("policy").items()}


def test_the_numbers_are_the_same_bit_for_bit(load: Callable[..., Experts]) -> None:
    both, one = load(False), load(True)
    host = {
        name: {key: (kept.data_ptr(), kept.clone()) for key, kept in part.items()}
        for name, part in turns_of(one).host.items()
    }
    expected, seen = trained(both), weights_seen(one)
    found = trained(one)
    assert seen and all(seen), "each layer computes with what is on the device, in backward too"
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(found[name], gradient), name
    # high, low for the batch and high for its backward; low and high forward; low's backward
    assert turns_of(one).swaps >= 5
    for name, part in host.items():
        for key, (place, value) in part.items():
            kept = turns_of(one).host[name][key]
            assert kept.data_ptr() == place and torch.equal(kept, value), "the host's copies are only read"


def test_one_networks_weights_are_on_the_device(load: Callable[..., Experts]) -> None:
    model = load(True)
    taking, condition = turns_of(model), asked(model, 1)
    latents = torch.randn(1, *SHAPE)
    with torch.no_grad():
        for sigma, name, other in ((0.9, "transformer", "transformer_2"), (0.2, "transformer_2", "transformer")):
            model.velocity(latents, torch.tensor(sigma), condition)
            here = {key: parameter.data_ptr() for key, parameter in taking.weights[name].items()}
            assert here == {key: shared.data_ptr() for key, shared in taking.shared.items()}
            there = {key: parameter.data_ptr() for key, parameter in taking.weights[other].items()}
            assert there == {key: kept.data_ptr() for key, kept in taking.host[other].items()}
            model.velocity(latents, torch.tensor(sigma), condition)
    assert taking.swaps == 2
    frozen = {id(parameter) for part in taking.weights.values() for parameter in part.values()}
    assert not frozen & {id(parameter) for parameter in model.parameters("policy").values()}


def test_weights_that_wait_give_the_device_its_memory_back(load: Callable[..., Experts]) -> None:
    model = load(True)
    condition, latents = asked(model, 1), torch.randn(1, *SHAPE)
    with torch.no_grad(), model.adapter("policy"):
        before = model.velocity(latents, torch.tensor(0.9), condition)
        with on_host(model):
            assert not turns_of(model).shared and turns_of(model).current is None
        assert torch.equal(model.velocity(latents, torch.tensor(0.9), condition), before)


def test_what_waits_is_counted_as_it_is(load: Callable[..., Experts], monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, a weight that is larger than one by itself."""
    monkeypatch.setattr(turns, "CHUNK", 4096)
    model = load(True)
    for name, kept in turns_of(model).host.items():
        pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept.values()}
        sizes = [tensor.numel() * tensor.element_size() for tensor in kept.values()]
        groups = turns.chunks(sizes)
        assert sum(pieces.values()) == sum(turns.aligned(size) for size in sizes) and len(pieces) == len(groups) > 3
        assert all(len(group) == 1 or sum(turns.aligned(sizes[n]) for n in group) <= 4096 for group in groups)
        assert [tensor.shape for tensor in kept.values()] == [p.shape for p in turns_of(model).weights[name].values()]


def test_a_graph_whose_weights_are_gone_is_refused(load: Callable[..., Experts]) -> None:
    model = load(True)
    model.running.checkpointing = "none"
    condition, latents = asked(model, 1), torch.randn(1, *SHAPE)
    with model.adapter("policy"):
        velocity = model.velocity(latents, torch.tensor(0.9), condition)
        model.velocity(latents, torch.tensor(0.2), condition)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            velocity.sum().backward()
