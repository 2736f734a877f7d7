"""Products in float8 and attention in int8: as far from float64 as the rounding of what they multiply explains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prfl.backbone import eight_bits
from prfl.backbone.attention import INT8, why_not
from prfl.backbone.eight_bits import (
    LARGEST,
    float8,
    float8_linear,
    float8_product,
    int8,
    int8_attention,
    quantised,
    wide_product,
)
from tests.tolerance import assert_near, tolerance

HALF_STEP = 2**-4  # e4m3 has 3 bits of mantissa: so far is a value from the nearest, relative to it
SMALLEST = 2**-10  # below its normal values, in units of the scale


def some(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Rows of very different sizes."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * torch.logspace(-3, 3, shape[-2], dtype=torch.float64)[:, None]).to(dtype)


def bound(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each sum: that of its products' errors, and the rounding of the sum itself to ``dtype``."""

    def off(value: Tensor) -> Tensor:
        return HALF_STEP * value.abs() + SMALLEST * value.abs().amax(-1, keepdim=True) / LARGEST

    x, weight = x.double(), weight.double()
    products = x.abs() @ off(weight).t() + off(x) @ weight.abs().t() + off(x) @ off(weight).t()
    return products + 4 * torch.finfo(dtype).eps * (x.abs() @ weight.abs().t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 17, 9), (1, 128, 64), (33, 24, 48), (5, 1, 3)])
def test_a_product_is_as_far_from_float64_as_the_type_explains(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, terms, columns = shape
    x, weight = some(rows, terms, dtype=dtype), some(columns, terms, dtype=dtype, seed=1)
    found = float8_linear(x, weight, None)
    assert found.dtype == dtype and found.shape == (rows, columns)
    missed = (found.double() - F.linear(x.double(), weight.double())).abs()
    limit = bound(x, weight, torch.float32 if dtype == torch.float64 else dtype)
    assert (missed <= limit).all() and missed.max() > 0
    if terms > 1:
        assert (missed / (x.double().abs() @ weight.double().abs().t())).max() > 2**-10, "it rounds, and not to more"


def test_whatever_the_layout_and_with_a_bias() -> None:
    x, weight, bias = some(6, 16, 10), some(20, 8), torch.arange(20.0).double()
    whole = float8_linear(x.mT[..., ::2], weight, bias)  # (6, 10, 8) of strides 2
    assert whole.shape == (6, 10, 20)
    assert torch.equal(whole, float8_linear(x.mT[..., ::2].contiguous(), weight.t().contiguous().t(), bias))
    one = float8_linear(x.mT[4, :, ::2], weight, bias)
    assert_near(whole[4].float(), one.float(), terms=8, name="a row does not see the others")
    assert_near((whole - bias).float(), float8_linear(x.mT[..., ::2], weight, None).float(), terms=8)


def test_rows_of_zeros_and_of_one_large_value() -> None:
    x = torch.zeros(2, 16)
    x[1, 3] = 1e30
    rounded, scales = quantised(x)
    torch.testing.assert_close(rounded.float() * scales, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(float8_linear(x, torch.eye(16), None), x, rtol=1e-6, atol=0)


def test_autocast_decides_the_type_and_not_the_sums() -> None:
    x, weight = some(40, 64, dtype=torch.float32), some(32, 64, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = float8_linear(x, weight, torch.ones(32))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, float8_linear(x, weight, torch.ones(32)).bfloat16())


def parts(device: str, dtype: torch.dtype) -> tuple:
    x, weight, bias = some(40, 128, dtype=dtype), some(48, 128, dtype=dtype, seed=1), torch.randn(48, dtype=dtype)
    return (*quantised(x.to(device)), *quantised(weight.to(device)), bias.to(device), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_torchs_own_product_it_is_the_same(dtype: torch.dtype) -> None:
    try:
        check_products("cpu", dtype)
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with float8"
)
def test_by_a_gpus_product_it_is_the_same() -> None:
    check_products("cuda", torch.bfloat16)
    x, weight = some(40, 128, dtype=torch.bfloat16), some(48, 128, dtype=torch.bfloat16, seed=1)
    missed = (float8_linear(x.cuda(), weight.cuda(), None).cpu().double() - x.double() @ weight.double().t()).abs()
    assert (missed <= bound(x, weight, torch.bfloat16)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and sageattention")
def test_a_gpus_attention_in_8_bits_passes_its_trial() -> None:
    pytest.importorskip("sageattention")
    assert why_not(INT8, torch.device("cuda"), torch.bfloat16, 128) == ""


def check_products(device: str, dtype: torch.dtype) -> None:
    given = parts(device, dtype)
    found, expected = float8_product(*given), wide_product(*given)
    rows, row_scales, columns, column_scales, bias = (each.double() for each in given[:5])
    size = rows.abs() @ columns.abs().t() * row_scales * column_scales.t() + bias.abs()
    assert ((found.double() - expected.double()).abs() <= tolerance(dtype, terms=128) * size).all()


def test_the_size_of_a_scale_is_a_rows_own() -> None:
    x = some(5, 64)
    for rounded, levels in ((int8(x), 127), (float8(x), LARGEST)):
        step = x.abs().amax(-1, keepdim=True) / levels
        near = step / 2 if levels == 127 else (x.abs() * HALF_STEP).maximum(SMALLEST * step)
        assert ((rounded - x).abs() <= near * (1 + 1e-12)).all() and not torch.equal(rounded, x)


def test_int8_attention_is_as_far_from_exact_as_its_rounding_explains() -> None:
    """Weights exp(s) off by exp(+-d) give a mean of values that is off by (exp(2 d) - 1) of their spread."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 40, 3, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    step_q, step_k = (x.abs().amax(-1, keepdim=True) / 127 / 2 for x in (query, key))
    logits = torch.einsum("bthc,bshc->bhts", step_q.expand_as(query), key.abs())
    logits = logits + torch.einsum("bthc,bshc->bhts", query.abs() + step_q, step_k.expand_as(key))
    d = logits.amax((-2, -1)) / 4  # by sqrt(16)
    spread = value.abs().amax((1, 3))
    limit = ((2 * d).exp() - 1) * spread + HALF_STEP * spread
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    missed = (int8_attention(query, key, value) - exact).abs()
    assert (missed.amax((1, 3)) <= limit).all() and missed.max() > 1e-3
    assert missed.max() < 0.1, "of values of about one"


def test_only_values_are_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(eight_bits, "QUERIES_AND_KEYS", lambda x: seen.append("int8") or int8(x))
    monkeypatch.setattr(eight_bits, "VALUES", lambda x: seen.append("float8") or float8(x))
    int8_attention(*torch.randn(3, 1, 4, 2, 8))
    assert seen == ["int8", "int8", "float8"]
