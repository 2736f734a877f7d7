"""prfl_kernels' operations in the tiny transformer: the same numbers, names and gradients; in and out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bench.cases.block_case import wan_block
from bench.cases.kernel_problem import EAGER, OURS, WORLDS
from bench.harness.agreement import too_far
from bench.harness.measure import outputs
from bench.harness.problem import prepare
from prfl.backbone import LoraSpec, load_architecture
from prfl.backbone.network import train_all
from prfl.backbone.wan import kernels, model
from prfl.backbone.wan.kernels import SWAPPED, KernelBlock, plain_lora
from prfl.backbone.wan.model import WanBackbone
from prfl.estimate.live_tensors import SavedBytes
from prfl.utils.errors import PrflError

ALL = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
WHICH = [(name,) for name in SWAPPED] + [SWAPPED]
PROMPTS = ["a red circle", "a"]


def with_adapter(backbone: WanBackbone, targets: list[str] = ALL, dropout: float = 0.0) -> WanBackbone:
    backbone.add_adapter("policy", LoraSpec(rank=3, alpha=6.0, targets=targets, dropout=dropout))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters("policy").values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in backbone.transformer.named_parameters():  # Wan's are not ones
            if ".norm_q." in name or ".norm_k." in name or ".norm2." in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    return backbone


def computed(backbone: WanBackbone, adapter: str | None = "policy") -> dict[str, Tensor]:
    """The velocity, and the gradients of something of it, by latents and adapter."""
    shape = (2, backbone.facts.latent_channels, 3, 4, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own = backbone.parameters("policy") if adapter else {}
    with backbone.adapter(adapter):
        velocity = backbone.velocity(latents, torch.tensor([0.3, 0.8]), backbone.condition(PROMPTS))
        gradients = torch.autograd.grad(velocity.sin().sum(), [latents, *own.values()])
    return {"velocity": velocity.detach(), **dict(zip(["latents", *own], gradients, strict=True))}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("which", WHICH, ids="+".join)
@pytest.mark.parametrize("mode", ["none", "attention", "full"])
def test_the_same_numbers_and_gradients(tiny_backbone: WanBackbone, which: tuple[str, ...], mode: Any) -> None:
    backbone = with_adapter(tiny_backbone)
    expected, base = computed(backbone), computed(backbone, None)
    assert all(value.abs().max() > 1e-4 for value in expected.values())
    backbone.running.checkpointing = mode
    backbone.use_kernels(which)
    assert_close(computed(backbone), expected)
    assert_close(computed(backbone, None), base)


def test_blocks_in_pairs_are_checkpointed_together(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 lean blocks are, 3 are not; the gradients are the same."""
    backbone = with_adapter(tiny_backbone)
    expected = computed(backbone)
    backbone.running.checkpointing = "full"
    backbone.use_kernels()
    assert backbone.blocks_a_checkpoint == 1
    monkeypatch.setattr(WanBackbone, "blocks_a_checkpoint", 2)
    calls = []
    right = model.run_block
    monkeypatch.setattr(model, "run_block", lambda *args, **kwargs: calls.append(1) or right(*args, **kwargs))
    assert_close(computed(backbone), expected)
    assert len(calls) == 2  # two blocks, and one


def test_how_many_blocks_a_checkpoint() -> None:
    for size, group in (("1.3B", 1), ("14B", 2)):
        backbone = load_architecture(f"Wan-AI/Wan2.1-T2V-{size}-Diffusers", torch.bfloat16)
        assert backbone.blocks_a_checkpoint == 1
        backbone.use_kernels()
        backbone.running.checkpointing = "full"
        assert backbone.blocks_a_checkpoint == group
        backbone.running.offload = True
        assert backbone.blocks_a_checkpoint == 1


def test_names_stay_and_one_call_undoes_it(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)
    expected, keys = computed(backbone), list(backbone.transformer.state_dict())
    backbone.use_kernels()
    assert type(backbone.transformer.blocks[0]) is KernelBlock
    assert list(backbone.transformer.state_dict()) == keys
    backbone.use_kernels(())
    assert type(backbone.transformer.blocks[0]) is WanTransformerBlock
    assert all(torch.equal(value, expected[name]) for name, value in computed(backbone).items())


def test_rotary_tables_are_packed_once_for_all_blocks(
    tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block has its projections fused, which diffusers' own processor takes, and its tables."""
    backbone, packed = with_adapter(tiny_backbone), []
    right = kernels.pack_tables
    monkeypatch.setattr(kernels, "pack_tables", lambda *tables: packed.append(1) or right(*tables))
    expected = computed(backbone)
    rope = backbone.transformer.rope
    whole = rope(torch.zeros(2, 4, 3, 4, 4))
    backbone.use_kernels()
    assert_close(computed(backbone), expected)
    assert len(packed) == 1 and rope(torch.zeros(2, 4, 3, 4, 4))[0].shape[-1] == whole[0].shape[-1] // 2
    backbone.use_kernels(("lora_linear",))
    assert_close(computed(backbone), expected)
    assert len(packed) == 2 and all(map(torch.equal, rope(torch.zeros(2, 4, 3, 4, 4)), whole))
    backbone.use_kernels()
    attn = backbone.transformer.blocks[0].attn1
    given = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(2)), None, None
    plain = attn(*given, rope(torch.zeros(1, 4, 3, 4, 4)))
    attn.fused_projections, attn.to_qkv = True, lambda x: torch.cat([attn.to_q(x), attn.to_k(x), attn.to_v(x)], -1)
    torch.testing.assert_close(attn(*given, rope(torch.zeros(1, 4, 3, 4, 4))), plain, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: on a CPU tests/benchmark has the torch path")
@pytest.mark.parametrize("world", ["tiny", "small"])
def test_a_block_in_bfloat16_is_as_good_as_diffusers_on_a_gpu(world: str) -> None:
    """With adapters on all its layers, forward and backward, against float64."""
    problem = wan_block(world, WORLDS[world][0].tokens, "both", 16)
    ours, theirs = (outputs(prepare(problem, provider)) for provider in (OURS, EAGER))
    assert problem.exact is not None and ours is not None and theirs is not None
    exact = problem.exact()
    assert ours.keys() == theirs.keys() == exact.keys() and not too_far(ours, theirs, exact)


@pytest.mark.parametrize("targets", [["to_q"], ["to_k", "ffn.net.2"], ["attn2.to_v", "ffn.net.0.proj"]])
def test_adapters_on_some_layers_only(tiny_backbone: WanBackbone, targets: list[str]) -> None:
    backbone = with_adapter(tiny_backbone, targets)
    expected = computed(backbone)
    backbone.use_kernels()
    assert_close(computed(backbone), expected)


def test_a_new_adapter_leaves_the_base_as_it_is_bit_for_bit(tiny_backbone: WanBackbone) -> None:
    tiny_backbone.use_kernels()
    tiny_backbone.add_adapter("policy", LoraSpec(rank=3, alpha=6.0, targets=ALL))
    assert torch.equal(computed(tiny_backbone)["velocity"], computed(tiny_backbone, None)["velocity"])


def test_merged_weights_are_used_as_they_are(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)
    expected = computed(backbone)["velocity"]
    backbone.use_kernels()
    layers = [module for module in backbone.transformer.modules() if isinstance(module, LoraLayer)]
    with backbone.adapter("policy"):
        assert all(plain_lora(layer) is not None for layer in layers)
        for layer in layers:
            layer.merge()
        assert all(plain_lora(layer) is None for layer in layers)
        merged = backbone.velocity(
            torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(1)),
            torch.tensor([0.3, 0.8]),
            backbone.condition(PROMPTS),
        )
    assert_close({"velocity": merged}, {"velocity": expected})


def test_dropout_is_one_function_whatever_computes_it(tiny_backbone: WanBackbone) -> None:
    """Only inside ``dropping``; the same masks by peft's layers and by ours, and when a checkpoint computes again."""
    backbone, seeds = with_adapter(tiny_backbone, dropout=0.4), torch.tensor([3, 4])
    whole = computed(backbone)
    with backbone.adapter("policy", seeds):
        plain = computed(backbone)
        assert (plain["velocity"] - whole["velocity"]).abs().amax((1, 2, 3, 4)).min() > 1e-3
        for mode in ("full", "attention"):
            backbone.running.checkpointing = mode
            assert_close(computed(backbone), plain)
        backbone.use_kernels()
        for mode in ("none", "full"):
            backbone.running.checkpointing = mode
            assert_close(computed(backbone), plain)
    backbone.transformer.train()  # as whoever takes the network itself might: our masks are not torch's
    assert_close(computed(backbone), whole)


def test_a_time_of_every_token(tiny_backbone: WanBackbone) -> None:
    """Wan 2.2: the time embedding is (B, T, 6, D)."""
    network = with_adapter(tiny_backbone).transformer
    block, generator = network.blocks[1], torch.Generator().manual_seed(2)
    hidden, text = (torch.randn(2, n, 24, generator=generator) for n in (12, 5))
    temb = torch.randn(2, 12, 6, 24, generator=generator)
    rotary = network.rope(torch.zeros(2, 4, 3, 4, 4))
    plain = block(hidden, text, temb, rotary)
    tiny_backbone.use_kernels()
    torch.testing.assert_close(block(hidden, text, temb, rotary), plain, rtol=2e-5, atol=2e-5)


def test_without_a_norm_before_the_cross_attention(make_tiny_pipeline: Callable[..., Any], tmp_path: Any) -> None:
    from prfl.backbone import load_backbone

    backbone = with_adapter(load_backbone(make_tiny_pipeline(tmp_path / "plain", cross_attn_norm=False)))
    expected = computed(backbone)
    backbone.use_kernels()
    assert_close(computed(backbone), expected)


@pytest.mark.slow
def test_compiled_blocks(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_adapter(tiny_backbone)
    expected = computed(backbone)
    backbone.use_kernels()
    torch._dynamo.reset()
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own checks cannot be traced
    backbone.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert_close(computed(backbone), expected)


def test_blocks_keep_less(tiny_backbone: WanBackbone) -> None:
    backbone = with_adapter(tiny_backbone)

    def kept() -> int:
        with SavedBytes() as saved, backbone.adapter("policy"):
            latents = torch.randn(2, 4, 5, 8, 8)
            velocity = backbone.velocity(latents, torch.tensor(0.5), backbone.condition(PROMPTS))
            del velocity
        return saved.peak

    plain = kept()
    backbone.use_kernels()
    assert kept() < 0.7 * plain  # the weights that autograd keeps are in both; a block of Wan's shape: test_memory.py


def test_a_planted_mistake_shows(tiny_backbone: WanBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = with_adapter(tiny_backbone)
    expected = computed(backbone)
    backbone.use_kernels()
    right = kernels.gated_residual
    monkeypatch.setattr(
        kernels, "gated_residual", lambda x, y, gate: right(x, y, None if gate is None else 1.01 * gate)
    )
    with pytest.raises(AssertionError):
        assert_close(computed(backbone), expected)


def test_refusals(tiny_backbone: WanBackbone) -> None:
    with pytest.raises(PrflError, match="no kernels"):
        tiny_backbone.use_kernels(["attend"])
    train_all(tiny_backbone)
    with pytest.raises(PrflError, match="a frozen base"):
        tiny_backbone.use_kernels()
    tiny_backbone.use_kernels(())
