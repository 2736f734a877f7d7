"""The Triton source of attention against float64, torch's own error being the measure."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from prfl_kernels import reference
from prfl_kernels.attention import attention
from prfl_kernels.dispatch import interpreting
from tests.kernels.checks import assert_as_good, random

triton = pytest.importorskip("triton")

from prfl_kernels import attention_triton  # noqa: E402
from prfl_kernels.attention_triton import Tiles  # noqa: E402


class Case(NamedTuple):
    queries: int
    keys: int
    channels: int = 64
    tiles: Tiles | None = None  # the rule's own
    bias: bool = False
    lying: str = "plain"  # how the rows lie
    batch: int = 2
    heads: int = 2


SMALL = Tiles(32, 16, 4, 1)
compiled = pytest.mark.skipif(interpreting(), reason="needs a GPU: its own tiles, pipelines and lengths")
CASES = {
    "one tile, ragged": Case(5, 3, 64, SMALL),
    "ragged tails": Case(37, 35, 64, SMALL),
    "whole tiles": Case(64, 32, 16, SMALL),
    "one query": Case(1, 2, 32, SMALL),
    "chunks of one projection": Case(33, 33, 128, SMALL, lying="chunks"),
    "heads first": Case(40, 17, 64, SMALL, bias=True, lying="heads first"),
    "channels apart": Case(18, 20, 64, SMALL, lying="channels apart"),
    "folded text": Case(50, 21, 64, SMALL, bias=True),
    "a pipeline's steady state": Case(165, 85, 16, SMALL, batch=1, heads=1),  # five whole tiles and a ragged one
    "the rule's tiles": Case(133, 131, 128, batch=1, heads=1),
    "the rule's tiles, text": Case(140, 77, 64, bias=True, batch=1, heads=2),
}


@pytest.fixture(autouse=True)
def only_what_compiles(request: pytest.FixtureRequest) -> None:
    if "dtype" in request.fixturenames and request.getfixturevalue("dtype") == torch.float64 and not interpreting():
        pytest.skip("float64 is for the interpreter; a GPU's dot has it only in some shapes")


def inputs(case: Case, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor | None]:
    def lie(tokens: int, seed: int) -> Tensor:
        shape = (case.batch, tokens, case.heads, case.channels)
        x = random(*shape, seed=seed, dtype=dtype, device=device)
        if case.lying == "chunks":
            return torch.cat([x, x.flip(1), x], 2).chunk(3, 2)[1]
        if case.lying == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if case.lying == "channels apart":
            return x.mT.contiguous().mT
        return x

    named = {"query": lie(case.queries, 0), "key": lie(case.keys, 1), "value": lie(case.keys, 2) + 1}
    bias = None
    if case.bias:  # one key stands for 400, some are not to be seen, among them a whole first tile of the second item
        bias = torch.zeros(case.batch, case.keys, device=device)
        bias[:, -1] = 400.0
        bias = bias.clamp(min=1).log()
        bias[-1, :16] = float("-inf")
    return {name: x.detach().requires_grad_() for name, x in named.items()}, bias


def results(attend, given: dict[str, Tensor], bias: Tensor | None, scale: float | None = None) -> dict[str, Tensor]:
    out = attend(*given.values(), bias, scale)
    grads = torch.autograd.grad(out, [*given.values()], random(*out.shape, seed=9, device=str(out.device)).to(out))
    return {"out": out.detach(), **dict(zip(given, grads, strict=True))}


def double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_() for name, x in given.items()}


def check(case: Case, device: str, dtype: torch.dtype, scale: float | None = None) -> None:
    given, bias = inputs(case, device, dtype)
    exact = results(reference.attention, double(given), None if bias is None else bias.double(), scale)
    ours = results(attention, given, bias, scale)
    if dtype == torch.float64:  # there torch is what is exact
        for name, value in exact.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)
    else:
        assert_as_good(ours, results(reference.attention, given, bias, scale), exact)


@pytest.mark.parametrize("name", CASES)
def test_as_good_as_torch(name: str, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    if case.tiles is None and dtype == torch.float64:
        pytest.skip("float64 has no tiles of its own")
    if case.tiles is not None:
        monkeypatch.setattr(attention_triton, "tiles", lambda *_: case.tiles)
    check(case, device, dtype)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.3])
def test_a_scale_of_either_sign(scale: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one above zero goes into the exponent."""
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: SMALL)
    check(Case(37, 35, 16, batch=1), device, torch.float32, scale)


@compiled
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(517, 645), (1500, 77)])
def test_many_whole_tiles_of_the_rule(queries: int, keys: int, half: torch.dtype, device: str) -> None:
    for channels in (64, 128):
        check(Case(queries, keys, channels), device, half)


@compiled
@pytest.mark.parametrize("tokens", [4096, 32760])
def test_lengths_of_a_video(tokens: int, device: str) -> None:
    """bfloat16 against float64, which is computed a slice of the queries at a time."""
    given, _ = inputs(Case(tokens, tokens, 128, batch=1, heads=1), device, torch.bfloat16)
    ours, torchs = (results(attend, given, None) for attend in (attention, reference.attention))
    query, key, value = (x.detach().double()[0, :, 0] for x in given.values())
    grad = random(1, tokens, 1, 128, seed=9, device=device).to(torch.bfloat16).double()[0, :, 0]
    exact = {name: torch.zeros_like(x) for name, x in zip(ours, (query, query, key, value), strict=True)}
    for own in torch.arange(tokens, device=device).split(1024):
        weights = (query[own] @ key.T * 128**-0.5).softmax(-1)
        exact["out"][own] = weights @ value
        d_weights = grad[own] @ value.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * 128**-0.5
        exact["query"][own] = d_scores @ key
        exact["key"] += d_scores.T @ query[own]
        exact["value"] += weights.T @ grad[own]
    assert_as_good(ours, torchs, {name: x[None, :, None] for name, x in exact.items()})


def test_the_tiles_follow_the_gpu() -> None:
    of = attention_triton.tiles
    kernel = attention_triton._query_gradient
    assert of(kernel, 2, 128, 8) == (64, 64, 8, 2) and of(kernel, 2, 64, 8) == (64, 64, 4, 2)
    assert of(kernel, 2, 128, 9) == of(kernel, 2, 64, 9) == (128, 64, 8, 2)
    assert of(kernel, 2, 128, 12) == (64, 64, 8, 2) and of(kernel, 2, 64, 12) == (64, 64, 4, 2)
    assert of(kernel, 2, 128, 11) == of(kernel, 2, 128, 8)  # a GPU that nobody has tried
    assert of(kernel, 4, 128, 9) == of(kernel, 4, 64, 8)


def test_without_a_gradient_to_come_the_same_and_no_logarithm(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: SMALL)
    given, bias = inputs(CASES["folded text"], device, torch.float32)
    with torch.no_grad():
        alone = attention(*given.values(), bias)
        assert torch.ops.prfl.attention(*given.values(), bias, 0.125, False)[1].numel() == 0
    assert torch.equal(alone, attention(*given.values(), bias))


def test_every_run_gives_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: SMALL)
    given, _ = inputs(CASES["ragged tails"], device, torch.float32)
    first, second = (results(attention, given, None) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_queries_in_shares_where_keys_are_few(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of them is shorter, or empty."""
    assert attention_triton.parts(4 * 12, 32760) == 5 and attention_triton.parts(256 * 12, 32760) == 1
    assert attention_triton.parts(1, 1000) == 1
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: Tiles(16, 32, 4, 1))
    for count in (2, 4):
        monkeypatch.setattr(attention_triton, "parts", lambda *_, count=count: count)
        check(Case(68, 21, 64, bias=True, batch=1), device, torch.float32)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_shares_are_added_before_they_are_rounded(
    half: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 shares the error is that of one, which is a single rounding: rounded first it is a tenth more, at least."""
    if half == torch.bfloat16 and interpreting():
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and truncates to it")
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: Tiles(16, 32, 4, 1))
    given, _ = inputs(Case(512, 21, 32, batch=1), device, half)
    exact = results(reference.attention, double(given), None)
    errors = []
    for count in (1, 8):
        monkeypatch.setattr(attention_triton, "parts", lambda *_, count=count: count)
        ours = results(attention, given, None)
        errors.append({name: (ours[name].double() - exact[name]).norm().item() for name in ("key", "value")})
    assert all(errors[1][name] < 1.08 * errors[0][name] for name in errors[0]), errors


def test_rows_are_counted_in_64_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row begins beyond 2^31 elements: as at a batch of three of 75600 tokens, 3 x 13824 apart.  The memory
    between the rows is never touched."""
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: Tiles(64, 64, 4, 1))
    tokens, row = 300, 1 << 23
    assert 75600 * 3 * 13824 > 2**31 and (tokens - 1) * row > 2**31
    x = torch.empty(tokens * row, dtype=torch.float16, device=device).as_strided((1, tokens, 1, 16), (0, row, 16, 1))
    x.copy_(random(*x.shape, dtype=x.dtype, device=device))
    near = x.contiguous()
    given = [x.detach().requires_grad_() for _ in range(3)]
    close = [near.detach().requires_grad_() for _ in range(3)]
    found, wanted = (results(attention, dict(zip("qkv", each, strict=True)), None) for each in (given, close))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    far = torch.empty_strided((1, 3, 1, 16), (0, 1 << 25, 16, 1), device="meta")
    with pytest.raises(ValueError, match="rows lie so far apart"):
        attention_triton.forward(far, far, far, None, far, None, 1.0)


def test_log_sum_exp(device: str) -> None:
    given, bias = inputs(Case(37, 35, bias=True, tiles=SMALL), device, torch.float32)
    lse = torch.ops.prfl.attention(*given.values(), bias, 0.125, True)[1]
    query, key, _ = double(given).values()
    wanted = (torch.einsum("bthc,bshc->bhts", query, key) * 0.125 + bias[:, None, None].double()).logsumexp(-1)
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_head_size_that_does_not_fit(device: str) -> None:
    x = torch.zeros(1, 4, 2, 24, device=device)
    with pytest.raises(ValueError, match="heads of 24 channels: the kernel takes 16, 32, 64, 128"):
        attention(x, x, x)


MISTAKES = {
    "another scale": "out: error",
    "the ragged tail's mask is dropped": "out: error",
    "delta is missing": "query: error",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted around the sources: what the tolerance is for."""
    monkeypatch.setattr(attention_triton, "tiles", lambda *_: SMALL)
    if mistake == "another scale":
        constants = attention_triton._constants
        monkeypatch.setattr(attention_triton, "_constants", lambda *each: constants(*each) | {"SCALE": 0.126})
    elif mistake == "delta is missing":
        right = attention_triton.query_gradient

        def without(grad, query, key, value, bias, out, *rest):
            right(grad, query, key, value, bias, torch.zeros_like(out), *rest)

        monkeypatch.setattr(attention_triton, "query_gradient", without)
    else:  # the kernel believes in as many keys as fill the last tile: zeros, where the tail is cut out of a longer row
        launch = attention_triton._launch

        def beyond(kernel, grid, sizes, pointers, strided, *rest, **more):
            query, key, value = strided
            launch(
                kernel,
                grid,
                sizes,
                pointers,
                (query, key.as_strided((2, 48, 2, 64), key.stride()), value),
                *rest,
                **more,
            )

        monkeypatch.setattr(attention_triton, "_launch", beyond)
    given, bias = inputs(Case(37, 35), device, torch.float32)
    if "mask" in mistake:
        longer = {name: torch.cat([x.detach(), torch.zeros_like(x)], 1) for name, x in given.items()}
        given = {name: x[:, : given[name].shape[1]].requires_grad_() for name, x in longer.items()}
        with torch.no_grad(), pytest.raises(AssertionError, match=MISTAKES[mistake]):
            ours, torchs = attention(*given.values()), reference.attention(*given.values())
            assert_as_good({"out": ours}, {"out": torchs}, {"out": reference.attention(*double(given).values())})
        return
    with pytest.raises(AssertionError, match=MISTAKES[mistake]):
        exact = results(reference.attention, double(given), None)
        assert_as_good(results(attention, given, bias), results(reference.attention, given, bias), exact)
