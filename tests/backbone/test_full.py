"""Training all weights: in place, or in a copy beside the frozen base, with float32 weights in every mode."""

from __future__ import annotations

import pytest
import torch

from prfl.backbone import load_backbone
from prfl.backbone.network import add_copy, train_all

PROMPTS = ["a red circle", "a blue square"]


def given(backbone):
    noise = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return noise, torch.tensor([0.9, 0.3]), backbone.condition(PROMPTS)


def test_a_copy_is_selected_as_an_adapter_is(tiny_backbone):
    base = tiny_backbone.transformer
    add_copy(tiny_backbone, "policy")
    before = tiny_backbone.velocity(*given(tiny_backbone))
    with tiny_backbone.adapter("policy"):
        torch.testing.assert_close(tiny_backbone.velocity(*given(tiny_backbone)), before, rtol=1e-5, atol=1e-5)
    for parameter in tiny_backbone.parameters("policy").values():
        parameter.data += 0.05
    with pytest.raises(ZeroDivisionError), tiny_backbone.adapter("policy"):
        assert not torch.equal(tiny_backbone.velocity(*given(tiny_backbone)), before)
        with tiny_backbone.adapter(None):
            assert torch.equal(tiny_backbone.velocity(*given(tiny_backbone)), before)
        assert tiny_backbone.transformer is not base
        raise ZeroDivisionError
    assert tiny_backbone.transformer is base and not any(p.requires_grad for p in base.parameters())
    assert torch.equal(tiny_backbone.velocity(*given(tiny_backbone)), before)
    assert tiny_backbone.parameters("policy").keys() == dict(base.named_parameters()).keys()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("in_place", [True, False])
def test_in_bf16_the_weights_and_their_gradients_are_float32(tiny_pipeline_folder, in_place, checkpointing):
    """A bf16 weight of 1 does not move by less than 0.004: small steps would be lost without a word."""
    exact = load_backbone(tiny_pipeline_folder)
    backbone = load_backbone(tiny_pipeline_folder, torch.bfloat16)
    backbone.running.checkpointing = checkpointing
    base = backbone.velocity(*given(backbone))
    if in_place:
        train_all(backbone)
        parameters = dict(backbone.transformer.named_parameters())
    else:
        add_copy(backbone, "policy")
        parameters = backbone.parameters("policy")
        assert backbone.transformer.proj_out.weight.dtype == torch.bfloat16
    assert {p.dtype for p in parameters.values()} == {torch.float32} and backbone.facts.dtype == torch.bfloat16
    with backbone.adapter(None if in_place else "policy"):
        velocity = backbone.velocity(*given(backbone))
        velocity.square().mean().backward()
        features = backbone.features(*given(backbone), [0])[0]
    assert features.dtype == torch.bfloat16, "it computes in bf16 all the same"
    torch.testing.assert_close(velocity.detach(), base, rtol=0.05, atol=0.02)
    torch.testing.assert_close(velocity.detach(), exact.velocity(*given(exact)), rtol=0.1, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters.values())
    weight = parameters["blocks.1.ffn.net.2.weight"]
    before = weight.detach().clone()
    weight.data -= 1e-6 * weight.grad.sign()
    assert (weight != before).double().mean() > 0.9
