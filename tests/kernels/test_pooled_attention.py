"""Pooling without keys and values: against the plain form, finite differences, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prfl.estimate.live_tensors import LiveBytes, SavedBytes
from prfl_kernels import pooled_attention as module
from prfl_kernels import reference
from prfl_kernels.pooled_attention import pooled_attention
from tests.kernels.checks import assert_as_good, random

WIDTHS = (6, 10)  # of two blocks
NAMES = ("embed", "queries", "key_weight", "value_weight", "scale")


def inputs(dtype: torch.dtype = torch.float64, tokens: int = 7, mean: float = 0.0) -> dict[str, Tensor]:
    """Two samples, two blocks, three queries of two heads; tokens as they lie where batch and time are swapped."""
    lying = [random(tokens, 2, width, seed=width).transpose(0, 1) + mean for width in WIDTHS]
    shapes = [(8, sum(WIDTHS)), (3, 4), (4, 8), (4, 8), (2, 1, 8)]
    drawn = [random(*shape, seed=i) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)]
    named = {"first": lying[0], "second": lying[1], **dict(zip(NAMES, drawn, strict=True))}
    return {name: each.to(dtype).detach().requires_grad_() for name, each in named.items()}


def run(pool, given: dict[str, Tensor]) -> Tensor:
    first, second, embed, queries, key_weight, value_weight, scale = given.values()
    return pool([first, second], embed, queries, key_weight, value_weight, 2, scale)


def with_gradients(pool, given: dict[str, Tensor]) -> dict[str, Tensor]:
    result = run(pool, given)
    grads = torch.autograd.grad((result * random(*result.shape, seed=9).to(result.dtype)).sum(), given.values())
    return {"out": result.detach(), **dict(zip(given, grads, strict=True))}


@pytest.fixture(params=[1, 48, 1 << 22], ids=lambda size: f"chunk{size}", autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token at a time, a few with a ragged tail, all."""
    monkeypatch.setattr(module, "CHUNK", request.param)


def test_it_is_the_plain_form() -> None:
    ours, plain = (with_gradients(pool, inputs()) for pool in (pooled_attention, reference.pooled_attention))
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(("of_tokens", "mean"), [(torch.float32, 0.0), (torch.float32, 10.0), (torch.bfloat16, 0.0)])
def test_it_is_as_exact_as_the_plain_form_in_float32(of_tokens: torch.dtype, mean: float) -> None:
    """Also where the mean of a token is ten times its deviation; half-precision tokens are read in float32."""
    tokens = 50
    given = inputs(torch.float32, tokens, mean)
    for name in ("first", "second"):
        given[name] = given[name].detach().to(of_tokens).requires_grad_()
    exact = {name: each.detach().double().requires_grad_() for name, each in given.items()}
    limits = with_gradients(reference.pooled_attention, exact)
    ours, plain = (with_gradients(pool, given) for pool in (pooled_attention, reference.pooled_attention))
    assert ours["first"].dtype == of_tokens and ours["out"].dtype == torch.float32
    assert_as_good(ours, plain, limits, terms=tokens, condition=max(1.0, mean))


@pytest.mark.parametrize("chunk", [48], indirect=True)
def test_gradients_against_finite_differences(chunk: None) -> None:
    given = inputs(tokens=4)
    assert torch.autograd.gradcheck(
        lambda *each: run(pooled_attention, dict(zip(given, each, strict=True))), [*given.values()]
    )


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given = inputs()
    given["first"].requires_grad_(False)
    run(pooled_attention, given).sum().backward()
    assert given["first"].grad is None and given["second"].grad is not None and given["queries"].grad is not None
    with (saved := SavedBytes()), torch.no_grad():
        run(pooled_attention, given)
    assert saved.peak == 0


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [48], indirect=True)
def test_it_compiles_whole(chunk: None) -> None:
    given = inputs()
    compiled = torch.compile(pooled_attention, fullgraph=True, backend="aot_eager")
    eager = with_gradients(pooled_attention, given)
    for name, value in with_gradients(compiled, given).items():
        torch.testing.assert_close(value, eager[name], rtol=1e-12, atol=1e-12)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"heads \(3\) must divide the width \(4\)"):
        pooled_attention([random(1, 2, 4)], random(4, 4), random(1, 4), random(4, 4), random(4, 4), 3)


@pytest.mark.parametrize("mistake", ["token means are forgotten", "the LayerNorm's backward is forgotten"])
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = with_gradients(reference.pooled_attention, inputs(mean=1.0))
    if mistake == "token means are forgotten":
        right = torch.var_mean
        monkeypatch.setattr(torch, "var_mean", lambda *args, **kwargs: (right(*args, **kwargs)[0], 0.0))
    else:
        monkeypatch.setattr(module, "_token_gradient", lambda x, mean, rstd, both, rows: rstd * (both @ rows))
    with pytest.raises(AssertionError, match="first: error"):
        assert_as_good(with_gradients(pooled_attention, inputs(mean=1.0)), plain, plain)


# MB at one video of 480p and 81 frames, one block's bfloat16 tokens, 128 channels, 4 heads, 1 query: what the forward
# pass leaves alive, its peak, and the peak of both passes less the tokens' own gradient.
SIZES = {
    (1536, "plain"): (453.7, 655.5, 554.8), (1536, "ours"): (0.8, 18.3, 37.7),
    (5120, "plain"): (1393.0, 2064.4, 1729.0), (5120, "ours"): (1.0, 18.3, 40.3),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1 << 22], indirect=True)
@pytest.mark.parametrize("width", [1536, 5120])
def test_bytes_at_wans_sizes(chunk: None, width: int) -> None:
    found = {}
    for name, pool in (("plain", reference.pooled_attention), ("ours", pooled_attention)):
        with torch.device("meta"):
            tokens = torch.empty(1, 32760, width, dtype=torch.bfloat16, requires_grad=True)
            shapes = [(128, width), (1, 128), (128, 128), (128, 128)]
            weights = [torch.empty(*shape, requires_grad=True) for shape in shapes]
        with LiveBytes() as counted:
            result = pool([tokens], *weights, 4)
            kept, forward = counted.live, counted.peak
            result.backward(torch.empty_like(result))
        found[name] = [each / 1e6 for each in (kept, forward, counted.peak - tokens.nbytes)]
        assert found[name] == pytest.approx(SIZES[width, name], rel=0.02, abs=0.05), found
    assert all(plain >= 5 * ours for plain, ours in zip(*found.values(), strict=True))
