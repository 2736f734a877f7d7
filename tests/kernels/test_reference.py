"""The references against torch's own modules, their formulas, and finite differences."""

from __future__ import annotations

import pytest
import torch

from prfl_kernels.reference import modulated_layer_norm, pooled_attention


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("tokens_of_modulation", [1, 5])
def test_modulated_layer_norm_is_its_formula(tokens_of_modulation: int) -> None:
    x, scale, shift = random(2, 5, 7), random(2, tokens_of_modulation, 7, seed=1), random(2, 1, 7, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    expected = (1 + scale) * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + shift
    torch.testing.assert_close(modulated_layer_norm(x, scale, shift), expected, rtol=1e-12, atol=1e-12)
    wrong = scale * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() + shift  # the 1 + forgotten
    assert not torch.allclose(modulated_layer_norm(x, scale, shift), wrong, rtol=1e-3)


def test_modulated_layer_norm_computes_in_float32_and_returns_the_input_type() -> None:
    x, scale, shift = (random(1, 3, 64, seed=i, dtype=torch.bfloat16) for i in range(3))
    result = modulated_layer_norm(x, scale, shift)
    exact = modulated_layer_norm(x.double(), scale.double(), shift.double())
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, exact.bfloat16())  # one rounding, at the end


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (2, 3), (3, 2)])
def test_pooled_attention_is_multi_head_attention(heads: int, queries: int) -> None:
    width = 6
    tokens, embed = [random(2, 5, 4), random(2, 5, 3, seed=4)], random(width, 7, seed=5)
    query, scale = random(queries, width, seed=1), random(2, 1, width, seed=6)
    key_weight, value_weight = random(width, width, seed=2), random(width, width, seed=3)
    identity = torch.eye(width, dtype=torch.float64)
    normed = torch.cat([torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in tokens], -1)
    inside = (scale * (normed @ embed.T)).transpose(0, 1)
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        query[:, None].expand(-1, 2, -1), inside, inside, width, heads,
        torch.cat([identity, key_weight, value_weight]), None, None, None, False, 0.0, identity, None,
    )  # fmt: skip
    result = pooled_attention(tokens, embed, query, key_weight, value_weight, heads, scale)
    torch.testing.assert_close(result, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_gradients_against_finite_differences() -> None:
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3, 4), (2, 1, 4), (2, 1, 4)])]
    assert torch.autograd.gradcheck(modulated_layer_norm, inputs)
    shapes = [(2, 3, 4), (4, 4), (2, 4), (4, 4), (4, 4)]
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(lambda x, *rest: pooled_attention([x], *rest, 2), inputs)
