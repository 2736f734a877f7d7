"""The Triton source of qk_norm_rope against its reference: q and k in one launch, padding, ragged tails, strides."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import prfl_kernels
from prfl_kernels import qk_norm_rope_triton
from prfl_kernels.qk_norm_rope import qk_norm_rope
from prfl_kernels.reference import qk_norm_rope as reference
from tests.kernels.checks import assert_as_good, random

# batch, tokens, heads, channels: several programs, a ragged last one, heads and channels that are padded
SHAPES = [(2, 5, 3, 6), (1, 1, 1, 2), (1, 67, 4, 16), (2, 3, 12, 128)]


def angles(tokens: int, channels: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (1, T, 1, C), every value twice, as WanRotaryPosEmbed gives them."""
    pairs = random(tokens, channels // 2, seed=9).mul(3).repeat_interleave(2, -1)[None, :, None]
    return pairs.cos().to(device, dtype), pairs.sin().to(device, dtype)


def results(
    norms: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], qkv: Tensor, grads: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """k is a chunk of qkv, q of a narrower tensor: each has its own strides, and room behind its rows for a mistake."""
    qkv = qkv.detach().requires_grad_()
    q, k, _ = qkv.chunk(3, -1)
    q = torch.cat([q, k], -1).chunk(2, -1)[0]
    outs = norms(q, k)
    dq, dk, rest = torch.autograd.grad(outs, qkv, [g.to(qkv.dtype) for g in grads])[0].chunk(3, -1)
    assert not rest.any()
    return {"q": outs[0].detach(), "k": outs[1].detach(), "dq": dq, "dk": dk}


def compared(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, rotate: bool = True, from_output: bool = True,
    tables: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Ours, torch's and the exact; q and k are chunks of one tensor, and their gradients rows of another."""
    batch, tokens, heads, channels = shape
    width = heads * channels
    qkv = random(batch, tokens, 3 * width, seed=1, device=device, dtype=dtype)
    weights = [random(width, seed=i, device=device, dtype=dtype).abs() + 0.25 for i in (2, 3)]
    cos, sin = angles(tokens, channels, device, tables) if rotate else (None, None)
    grads = random(batch, tokens, 2 * width, seed=4, device=device, dtype=dtype).chunk(2, -1)

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        outs = qk_norm_rope(q, k, *weights, cos, sin, heads, 1e-6, from_output)
        assert outs[1] is not None
        return outs[0], outs[1]

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        wide = [weight.to(q.dtype) for weight in weights]
        return reference(q, wide[0], cos, sin, heads), reference(k, wide[1], cos, sin, heads)

    return results(own, qkv, grads), results(plain, qkv, grads), results(plain, qkv.double(), grads)


@pytest.mark.parametrize("from_output", [True, False])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_q_and_k_of_one_projection(
    shape: tuple[int, int, int, int], rotate: bool, from_output: bool, dtype: torch.dtype, device: str
) -> None:
    ours, torchs, exact = compared(shape, dtype, device, rotate, from_output)
    assert all(each.isfinite().all() for each in ours.values())
    assert_as_good(ours, torchs, exact)


@pytest.mark.parametrize("tables", [torch.float64, torch.float16])
def test_tables_of_other_types(tables: torch.dtype, device: str) -> None:
    """Rounded tables are no rotation; the gradient from the output is exact all the same."""
    assert_as_good(*compared((1, 5, 3, 6), torch.float64, device, tables=tables))


MISTAKES = {
    "transposed pair": ("even * c - odd * s, even * s + odd * c", "even * s + odd * c, even * c - odd * s"),
    "rotated onward instead of back": (
        "even * c + odd * s, odd * c - even * s, R",
        "even * c - odd * s, odd * c + even * s, R",
    ),
    "norm of one head": ("/ WIDTH + EPS", "/ CHANNELS + EPS"),
    "scale forgotten": ("result = (g - value * mean) * scale", "result = g - value * mean"),
    "mean forgotten": ("result = (g - value * mean) * scale", "result = g * scale"),
    "mask dropped": (
        "value = tl.load(x + start + row * stride + column, mask=mask",
        "value = tl.load(x + start + row * stride + column, mask=row < tokens",
    ),
    "last token left out": ("token < tokens", "token < tokens - 1"),
    "k with the weight of q": ("= k, k_weight, k_out", "= k, q_weight, k_out"),
    "k with the strides of q": ("item * k_batch, k_row", "item * q_batch, q_row"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the source, since a compiled kernel does not see a patched helper."""
    right, wrong = MISTAKES[mistake]
    source = Path(qk_norm_rope_triton.__file__).read_text()
    assert right in source
    copy = tmp_path / "planted.py"
    copy.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(prfl_kernels, "qk_norm_rope_triton", module)
    with pytest.raises(AssertionError, match="error|not finite"):
        assert_as_good(*compared((1, 5, 3, 6), torch.float32, device))


@pytest.mark.parametrize("rotate", [True, False])
def test_q_alone(rotate: bool, device: str) -> None:
    """Text keys of cross-attention, and q: the same numbers as of both in one launch."""
    q = random(2, 7, 24, seed=1, device=device)
    k = random(2, 7, 60, seed=2, device=device).requires_grad_()[..., 12:36]
    weights = [random(24, seed=i, device=device).abs() + 0.25 for i in (3, 4)]
    cos, sin = angles(7, 6, device, torch.float64) if rotate else (None, None)
    together = qk_norm_rope(q, k, *weights, cos, sin, 4, from_output=True)
    alone, nothing = qk_norm_rope(k, None, weights[1], None, cos, sin, 4, from_output=True)
    assert nothing is None and together[1] is not None and torch.equal(alone, together[1])
    g = random(2, 7, 24, seed=5, device=device)
    assert torch.equal(torch.autograd.grad(alone, k, g)[0], torch.autograd.grad(together[1], k, g)[0])


def test_finite_differences(device: str) -> None:
    q, k = (random(2, 3, 12, seed=i, device=device).requires_grad_() for i in (1, 2))
    weights = [random(12, seed=i, device=device).abs() + 0.25 for i in (3, 4)]
    tables = angles(3, 6, device, torch.float32)
    for from_output in (True, False):
        assert torch.autograd.gradcheck(
            lambda q, k, how=from_output: qk_norm_rope(q, k, *weights, *tables, 2, 1e-6, how), (q, k), fast_mode=True
        )


@pytest.mark.parametrize("layout", ["rows apart", "channels apart", "expanded"])
def test_layouts(layout: str, device: str) -> None:
    """Inputs and gradients in any layout: none is misread."""
    made = []
    for seed in (1, 2):
        x = random(2, 5, 24, seed=seed, device=device)
        if layout == "rows apart":
            x = random(5, 2, 40, seed=seed, device=device)[..., 8:32].transpose(0, 1)
        elif layout == "channels apart":
            x = random(2, 24, 5, seed=seed, device=device).transpose(1, 2)
        else:
            x = x[:1, :1].expand(2, 5, 24)
        assert not x.is_contiguous()
        made.append(x)
    weight = random(24, seed=3, device=device).abs() + 0.25
    tables = angles(5, 6, device, torch.float64)
    x, grad = made[0].requires_grad_(), made[1]
    outs = [qk_norm_rope(x, None, weight, None, *tables, 4, from_output=how)[0] for how in (True, False)]
    outs.append(reference(x, weight, *tables, 4))
    grads = [torch.autograd.grad(out, x, grad)[0] for out in outs]
    for i in (0, 1):
        assert outs[i].is_contiguous()
        torch.testing.assert_close(outs[i], outs[2], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads[i], grads[2], rtol=1e-12, atol=1e-12)


def test_offsets_beyond_32_bits(device: str) -> None:
    """The third row starts after 2^31 elements, as some do in 75600 x 13824 x 3; only three rows' pages are touched."""
    stride, width = 2**30 + 16, 24
    assert 75600 * 13824 * 3 > 2 * stride > 2**31
    far = torch.empty(2 * stride + width, dtype=torch.float16, device=device).as_strided((1, 3, width), (0, stride, 1))
    weight = random(width, seed=2, device=device).abs() + 0.25
    tables = angles(3, 6, device, torch.float64)
    near, grad = (random(1, 3, width, seed=i, device=device, dtype=torch.float16) for i in (1, 3))
    outs, grads = [], []
    for _ in range(2):
        x = near.detach().requires_grad_()
        out = qk_norm_rope(x, None, weight, None, *tables, 4, from_output=True)[0]
        outs.append(out)
        grads.append(torch.autograd.grad(out, x, grad if not grads else far.copy_(grad))[0])
    assert torch.equal(*grads)
    assert torch.equal(outs[0], qk_norm_rope(far.copy_(near), None, weight, None, *tables, 4)[0])


def test_the_same_bits_run_to_run(device: str) -> None:
    first, second = (compared((1, 67, 4, 16), torch.float32, device)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("elements", [64, 128, 2048])
def test_one_or_more_tokens_a_program(elements: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk_norm_rope_triton, "ELEMENTS", elements)
    rows = qk_norm_rope_triton.blocks(4, 16).rows
    assert rows == elements // 64
    assert_as_good(*compared((1, 2 * rows + 3, 4, 16), torch.float32, device))  # two whole programs and a part


def test_no_gradient_no_statistics(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = qk_norm_rope_triton.forward
    monkeypatch.setattr(qk_norm_rope_triton, "forward", lambda *args: (seen.append(args[8]), forward(*args)))
    q = random(1, 3, 12, device=device).requires_grad_()
    weight = torch.ones(12, dtype=torch.float64, device=device)
    with torch.no_grad():
        still = qk_norm_rope(q, None, weight, None, None, None, 2)[0]
    moving = qk_norm_rope(q, None, weight, None, None, None, 2)[0]
    assert seen[0] is None and seen[1].shape == (1, 1, 3) and torch.equal(still, moving)


def test_every_block_fits_a_program() -> None:
    assert qk_norm_rope_triton.blocks(12, 128) == (1, 16, 128, 4)
    assert qk_norm_rope_triton.blocks(40, 128) == (1, 64, 128, 16)
    assert qk_norm_rope_triton.blocks(4, 32) == (16, 4, 32, 4)  # the shapes world's
