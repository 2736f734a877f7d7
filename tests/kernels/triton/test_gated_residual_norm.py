"""The Triton source of gate + residual + norm: values and gradients of every form, odd shapes, strides, addresses."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.checks import random
from tests.kernels.test_gated_residual_norm import FORMS, check, make, results, sum_and_nothing

triton = pytest.importorskip("triton")
tl = triton.language

from prfl_kernels import gated_residual_norm_triton as source  # noqa: E402
from prfl_kernels.gated_residual_norm import gated_residual, gated_residual_norm  # noqa: E402
from prfl_kernels.gated_residual_norm_triton import row_offset  # noqa: E402

SHAPES = [(2, 5, 7), (3, 1, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("forms", FORMS.values(), ids=FORMS)
def test_values_and_gradients(forms: tuple, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    for modulation in {dtype, torch.promote_types(dtype, torch.float32)}:
        options = dict(shape=shape, dtype=dtype, modulation=modulation, device=device)
        check(make(forms, **options))
        check(make((None, *forms[1:]), y=False, **options))
        check(make(forms, **options), sum_and_nothing)


@pytest.mark.parametrize("programs", [1, 6])
def test_sums_over_a_run_of_rows(
    programs: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 7 rows of a video in one program, with room to spare, or 4 and then 3: no run goes on into the next video."""
    monkeypatch.setattr(source, "PROGRAMS", programs)
    for forms in FORMS.values():
        check(make(forms, (2, 7, 24), dtype=dtype, device=device))
        check(make(forms, (2, 7, 24), dtype=dtype, device=device), sum_and_nothing)


def test_several_rows_a_program_where_nothing_is_summed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, d_total, d_normed = (random(2, 7, 24, seed=seed, dtype=torch.float32, device=device) for seed in range(4))
    gate, scale, shift = (random(2, 1, 24, seed=seed, dtype=torch.float32, device=device) for seed in (4, 5, 6))
    total, _, mean, rstd = source.forward(x, y, gate, (scale, shift), 1e-6)
    assert mean is not None and rstd is not None
    found, grids = [], []
    kind = type(source.backward_kernel)
    launch = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: (grids.append(grid), launch(kernel, grid))[1])
    for rows in (1, 4, 16):
        monkeypatch.setattr(source, "ROWS", rows)
        dx, dy, _ = source.backward(d_total, d_normed, total, (mean, rstd), None, gate, scale, (None,) * 3)
        found.append((dx, dy))
    torch.testing.assert_close(found[1:], found[:1] * 2)
    assert grids == [(7, 2), (2, 2), (1, 2)]


@pytest.mark.parametrize("width", [1536, 5120])
def test_wans_widths(width: int, dtype: torch.dtype, device: str) -> None:
    modulation = torch.promote_types(dtype, torch.float32)
    for forms in ("mixed", "shared"):
        check(make(FORMS[forms], (2, 3, width), dtype=dtype, modulation=modulation, device=device))


def test_strides_and_what_lies_beside_a_row(dtype: torch.dtype, device: str) -> None:
    """Rows out of order and NaN between them; a last dimension with a stride; gradients that are expanded."""
    inputs = make(FORMS["mixed"], (2, 5, 7), dtype=dtype, device=device)
    spoilt = torch.full((5, 2, 12), float("nan"), dtype=dtype, device=device)
    x, scale = spoilt.clone()[..., 2:9].transpose(0, 1), spoilt.clone()[0, 0, 3:10]
    y = torch.empty(2, 7, 5, dtype=dtype, device=device).transpose(1, 2)
    plain = results(gated_residual_norm, inputs)
    strided = {**inputs, "x": x.copy_(inputs["x"]), "y": y.copy_(inputs["y"]), "scale": scale.copy_(inputs["scale"])}
    for name, value in results(gated_residual_norm, strided).items():
        torch.testing.assert_close(value, plain[name], msg=name)
    leaf = inputs["x"].requires_grad_()
    out = gated_residual_norm(**inputs)
    expanded = torch.autograd.grad(out.x.sum() + out.normed.sum(), leaf, retain_graph=True)
    dense = torch.autograd.grad([out.x, out.normed], leaf, [torch.ones_like(out.x)] * 2)
    assert torch.equal(*expanded, *dense)


def test_the_norm_is_of_the_sum_as_it_was_rounded(dtype: torch.dtype, device: str) -> None:
    """Who rebuilds ``normed`` from the saved sum and the statistics finds what was there."""
    inputs = make(FORMS["shared"], (2, 5, 48), dtype=dtype, device=device)
    out = gated_residual_norm(**inputs)
    again = gated_residual_norm(out.x, None, None, inputs["scale"], inputs["shift"])
    for ours, wanted in ((out.mean, again.mean), (out.rstd, again.rstd)):
        torch.testing.assert_close(ours, wanted, rtol=2e-6, atol=1e-6)


def test_the_norm_of_numbers_far_from_zero(device: str) -> None:
    """E[x^2] - mean^2 has nothing left here in float32."""
    inputs = make(FORMS["shared"], (2, 3, 64), dtype=torch.float32, device=device)
    inputs["x"] = inputs["x"] + 3000
    check(inputs)


def test_two_runs_give_the_same_bits(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PROGRAMS", 6)
    inputs = make(FORMS["shared"], (2, 7, 24), dtype=dtype, device=device)
    first, second = (results(gated_residual_norm, inputs) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_gate_of_zero_is_the_stream_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    inputs = make(FORMS["shared"], (2, 5, 7), dtype=dtype, device=device)
    nothing = torch.zeros_like(inputs["gate"])
    assert torch.equal(gated_residual(inputs["x"], inputs["y"], nothing), inputs["x"])
    added = gated_residual_norm(inputs["x"], inputs["y"], nothing, inputs["scale"], inputs["shift"])
    alone = gated_residual_norm(inputs["x"], None, None, inputs["scale"], inputs["shift"])
    assert torch.equal(added.x, inputs["x"])
    torch.testing.assert_close(added.normed, alone.normed)


@triton.jit
def offsets_kernel(out, batch, tokens, stride_b, stride_t):
    b, t = tl.program_id(0) + batch - 1, tl.program_id(0) + tokens - 1
    tl.store(out, row_offset(b, t, stride_b, stride_t))


@pytest.mark.parametrize(
    ("batch", "tokens", "stride"),
    [(3, 75600, 13824), (1, 75600, 6 * 5120), (2, 75600, 6 * 5120)],
    ids=["three hidden states", "Wan 2.2's modulation", "two of it"],
)
def test_addresses_past_two_to_the_31(batch: int, tokens: int, stride: int, device: str) -> None:
    out = torch.zeros(1, dtype=torch.int64, device=device)
    offsets_kernel[(1,)](out, batch, tokens, tokens * stride, stride)
    assert out.item() == (batch * tokens - 1) * stride > 2**31
