"""Features and checkpointing of networks that are not Wan, by hooks and by their blocks' classes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, LTXVideoTransformer3DModel
from torch import Tensor, nn

from prfl.backbone import LoraSpec, adapters
from prfl.backbone.blocks import checkpoint_blocks, hidden_states
from prfl.backbone.checkpointing import Running
from prfl.utils.errors import PrflError

LISTS = ["transformer_blocks"]


class Cog:
    """Its blocks return (video, text) and are called by name."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = CogVideoXTransformer3DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
            text_embed_dim=32, num_layers=3, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
            temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=False,
        ).eval().requires_grad_(False)  # fmt: skip
        self.latents, self.text = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 16, 32)

    def __call__(self, latents: Tensor, network: nn.Module | None = None) -> Tensor:
        time = torch.tensor([500, 900])
        return (network or self.network)(
            hidden_states=latents, encoder_hidden_states=self.text, timestep=time, return_dict=False
        )[0]


class Ltx:
    """Its blocks return the video alone, and attend to the text."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=3, caption_channels=16,
        ).eval().requires_grad_(False)  # fmt: skip
        self.latents, self.text = torch.randn(2, 12, 8), torch.randn(2, 5, 16)

    def __call__(self, latents: Tensor, network: nn.Module | None = None) -> Tensor:
        return (network or self.network)(
            hidden_states=latents, encoder_hidden_states=self.text, timestep=torch.tensor([500, 900]),
            encoder_attention_mask=torch.ones(2, 5), num_frames=3, height=2, width=2, return_dict=False,
        )[0]  # fmt: skip


@pytest.fixture(params=[Cog, Ltx])
def model(request: pytest.FixtureRequest) -> Any:
    made = request.param()
    adapters.add_lora(made.network, "policy", LoraSpec(2, 2, ["to_q", "to_v"]), LISTS)
    for parameter in adapters.adapter_parameters(made.network, "policy").values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    adapters.set_active(made.network, "policy")
    return made


def blocks_of(network: nn.Module) -> list[nn.Module]:
    return list(network.get_submodule("transformer_blocks").children())


def gradients(model: Any, network: nn.Module | None = None) -> list[Tensor]:
    """Of the latents and of the adapter (in a copy: of all weights)."""
    leaf = model.latents.clone().requires_grad_()
    trained = [p for p in (network or model.network).parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(leaf, network).sin().sum(), [leaf, *trained], allow_unused=True))


@pytest.mark.parametrize("wanted", [[0], [1, 0]])
def test_only_the_blocks_that_are_wanted_run(model: Any, wanted: list[int]) -> None:
    ran, whole = [], {}
    blocks = blocks_of(model.network)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        block.register_forward_hook(
            lambda _, __, out, index=index: whole.update({index: out[0] if isinstance(out, tuple) else out})
        )
    model(model.latents)
    expected = [whole[index] for index in wanted]
    ran.clear()
    leaf = model.latents.clone().requires_grad_()
    states = hidden_states(lambda: model(leaf), blocks, wanted)
    assert ran == list(range(max(wanted) + 1))
    assert all(torch.equal(state, other) for state, other in zip(states, expected, strict=True))
    assert torch.autograd.grad(states[0].sum(), leaf)[0].abs().max() > 0
    model(model.latents)
    assert ran[-1] == 2, "the hooks are gone"


def test_blocks_that_do_not_exist(model: Any) -> None:
    with pytest.raises(PrflError, match="0 to 2"):
        hidden_states(lambda: model(model.latents), blocks_of(model.network), [3])


@pytest.mark.parametrize("mode, offload", [("full", False), ("full", True), ("attention", False)])
def test_a_checkpointed_gradient_is_equal(model: Any, mode: Any, offload: bool) -> None:
    expected, names = gradients(model), [name for name, _ in model.network.named_parameters()]
    running, blocks = Running(), blocks_of(model.network)
    checkpoint_blocks(blocks, running)
    assert [name for name, _ in model.network.named_parameters()] == names
    running.checkpointing, running.offload = mode, offload
    forwards: list[int] = []
    for block in blocks:
        block.attn1.register_forward_pre_hook(lambda *_: forwards.append(1))
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))
    assert len(forwards) == 6, "each block once more"


def test_features_of_checkpointed_blocks_have_their_gradient(model: Any) -> None:
    blocks, leaf = blocks_of(model.network), model.latents.clone().requires_grad_()

    def gradient() -> Tensor:
        (state,) = hidden_states(lambda: model(leaf), blocks, [1])
        return torch.autograd.grad(state.sin().sum(), leaf)[0]

    expected = gradient()
    checkpoint_blocks(blocks, Running(checkpointing="full"))
    assert torch.equal(gradient(), expected)


def test_a_copy_is_trained_and_not_the_base(model: Any) -> None:
    """The trap: a function on the instance would have the copy compute with the base's weights."""
    running = Running()
    checkpoint_blocks(blocks_of(model.network), running)
    copied = deepcopy(model.network).requires_grad_(True)
    expected = gradients(model, copied)
    running.checkpointing = "full"
    trained = gradients(model, copied)
    assert sum(gradient is not None for gradient in trained) == sum(gradient is not None for gradient in expected) > 50
    for one, other in zip(trained, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("mode", ["full", "attention"])
def test_recomputation_under_another_adapter_raises(model: Any, mode: Any) -> None:
    checkpoint_blocks(blocks_of(model.network), Running(checkpointing=mode))
    output = model(model.latents.clone().requires_grad_())
    with pytest.raises(PrflError, match="computed again under None"), adapters.use_adapter(model.network, None):
        output.sum().backward()


def test_adapters_count_blocks_over_several_lists() -> None:
    network = nn.Module()
    for name in ("joint_blocks", "single_blocks"):
        setattr(network, name, nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(2, 2)}) for _ in range(2)]))
    network.to_q = nn.Linear(2, 2)
    lists = ["joint_blocks", "single_blocks"]
    assert adapters.matching_layers(network, LoraSpec(1, 1, ["to_q"], blocks=[1, 2]), lists) == [
        "joint_blocks.1.to_q",
        "single_blocks.0.to_q",
    ]
    assert len(adapters.matching_layers(network, LoraSpec(1, 1, ["to_q"]), lists)) == 5
    with pytest.raises(PrflError, match="do not all exist"):
        adapters.matching_layers(network, LoraSpec(1, 1, ["to_q"], blocks=[4]), lists)
