"""LoRA linears: values, gradients, what is kept for the backward, and the ways they are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from prfl.estimate.live_tensors import LiveBytes, SavedBytes
from prfl_kernels import lora_linear
from prfl_kernels.lora_linear import Gelu, Normed, Projection, lora_linears
from prfl_kernels.reference import lora_linear as reference
from prfl_kernels.reference import modulated_layer_norm
from tests.kernels.checks import assert_as_good, random
from tests.tolerance import assert_near

EPS = 1e-6
WIDTH, OUTS, RANKS, SCALES = 12, (10, 6, 6), (2, 3, 3), (0.5, 2.0, 1.3)
SOURCES = ("none", "normed", "per token", "affine", "gelu")


class Products(TorchDispatchMode):
    """The matrix products that are called, and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.seen.append((str(func), tuple(out.shape)))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rank_wide_sums_are_not_split_in_half_precision(dtype: torch.dtype) -> None:
    """As on a GPU: what has the rank for a dimension is asked for in float32, and the layers' own products are not."""
    group = [Projection(*(None if x is None else x.to("meta", x.dtype) for x in p[:4]), p.scale) for p in projections()]
    group = [
        Projection(p.weight.to(dtype), None, *(x.detach().float().requires_grad_() for x in p[2:4]), p.scale)
        for p in group
    ]
    x = torch.empty(2, 5, WIDTH, dtype=dtype, device="meta", requires_grad=True)
    with Products() as products:
        outs = lora_linears(x, group)
        torch.autograd.grad(outs, [x, *(each for p in group for each in p[2:4])], [torch.ones_like(o) for o in outs])
    rank_wide = [name for name, shape in products.seen if set(shape) & {*RANKS, sum(RANKS)}]
    others = [name for name, shape in products.seen if not set(shape) & {*RANKS, sum(RANKS)}]
    assert set(rank_wide) == {"aten.mm.dtype"} and len(rank_wide) == 1 + len(RANKS) + 1 + len(RANKS)
    assert "aten.mm.dtype" not in others and len(others) >= 2 * len(RANKS)


def projections(dtype: torch.dtype = torch.float64, masters: torch.dtype | None = None) -> list[Projection]:
    return [
        Projection(
            random(out, WIDTH, seed=10 + i, dtype=dtype),
            None if i == 2 else random(out, seed=20 + i, dtype=dtype),
            random(rank, WIDTH, seed=30 + i, dtype=masters or dtype).requires_grad_(),
            random(out, rank, seed=40 + i, dtype=masters or dtype).requires_grad_(),
            scale,
        )
        for i, (out, rank, scale) in enumerate(zip(OUTS, RANKS, SCALES, strict=True))
    ]


def inputs(kind: str, dtype: torch.dtype = torch.float64, batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    found = {"x": random(batch, tokens, WIDTH, seed=1, dtype=dtype).requires_grad_()}
    shape = {"normed": (batch, 1, WIDTH), "per token": (batch, tokens, WIDTH), "affine": (WIDTH,)}.get(kind)
    if shape:
        wide = torch.promote_types(dtype, torch.float32)
        found |= {name: random(*shape, seed=i, dtype=wide).requires_grad_() for i, name in ((2, "scale"), (3, "shift"))}
    return found


def arrive(kind: str, leaves: dict[str, Tensor]) -> tuple[Tensor, Normed | Gelu | None]:
    """What the linear layers see, by plain torch, and what it was computed from."""
    x = leaves["x"]
    if kind == "none":
        return x * 1, None
    if kind == "gelu":
        return torch.nn.functional.gelu(x, approximate="tanh"), Gelu(x)
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    mean, rstd = wide.mean(-1), (wide.var(-1, correction=0) + EPS).rsqrt()
    scale, shift = leaves["scale"], leaves["shift"]
    return modulated_layer_norm(x, scale, shift, EPS), Normed(x, mean, rstd, scale, shift)


def plain(x: Tensor, group: list[Projection], mask: Tensor | None = None, dropout: float = 0.0) -> list[Tensor]:
    """Plain autograd, in the order of the formula; the mask is of the low-rank branch's input."""
    if mask is None:
        return [reference(x, *projection) for projection in group]
    dropped = x * mask / (1 - dropout)
    return [
        torch.nn.functional.linear(x, w, b) + scale * (dropped @ a.to(x.dtype).T) @ up.to(x.dtype).T
        for w, b, a, up, scale in group
    ]


def drawn_mask(x: Tensor, dropout: float) -> Tensor:
    """What the next call will draw."""
    state = torch.get_rng_state()
    kept = lora_linear.kept_inputs(torch.randint(2**63 - 1, ()), (x.shape[:-1].numel(), x.shape[-1]), dropout)
    torch.set_rng_state(state)
    return kept.view(x.shape)


def gradients(outputs: Any, leaves: dict[str, Tensor], group: list[Projection]) -> dict[str, Tensor]:
    """Outputs, and the gradients of a weighted sum of them, by name."""
    loss = sum((out * random(*out.shape, seed=50 + i).to(out)).sum() for i, out in enumerate(outputs))
    adapters = {f"{name}{i}": p[at] for i, p in enumerate(group) for at, name in ((2, "lora_a"), (3, "lora_b"))}
    wanted = leaves | adapters
    found = torch.autograd.grad(loss, list(wanted.values()))
    return {f"out{i}": out.detach() for i, out in enumerate(outputs)} | dict(zip(wanted, found, strict=True))


def everything(
    kind: str, dropout: float, dtype: torch.dtype, run: Callable | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Ours, torch's in the same dtype, and float64's from the same rounded numbers.

    What the source's own norm or gelu rounds is not ours to answer for: the linear layers' input is the leaf here,
    and the source is of the same numbers.
    """
    torch.manual_seed(0)
    leaves, group = inputs(kind, dtype), projections(dtype)
    x, source = arrive(kind, leaves)
    x = x.detach().requires_grad_()
    mask = drawn_mask(x, dropout) if dropout else None
    ours = gradients((run or lora_linears)(x, group, source=source, dropout=dropout), {"x": x}, group)
    torchs = gradients(plain(x, group, mask, dropout), {"x": x}, group)
    doubles = [Projection(*(t if t is None else t.detach().double() for t in p[:4]), p.scale) for p in group]
    for p in doubles:
        p.lora_a.requires_grad_(), p.lora_b.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    return ours, torchs, gradients(plain(x64, doubles, mask, dropout), {"x": x64}, doubles)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", SOURCES)
def test_gradients_are_those_of_plain_autograd(kind: str, dropout: float) -> None:
    """Also of what the source was computed from: it gets them through the input, and no second time."""
    torch.manual_seed(0)
    leaves, group = inputs(kind), projections()
    x, source = arrive(kind, leaves)
    mask = drawn_mask(x, dropout) if dropout else None
    ours = gradients(lora_linears(x, group, source=source, dropout=dropout), leaves, group)
    theirs = gradients(plain(arrive(kind, leaves)[0], group, mask, dropout), leaves, group)
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-11, atol=1e-11, msg=name)


def test_a_mask_is_its_samples_own() -> None:
    """A function of the seed, not of the batch: alone, in another order or before more rows it is the same."""
    seeds, group = torch.tensor([5, 2**62, -3]), projections()[:1]
    x = random(3, 7, WIDTH)
    (together,) = lora_linears(x, group, dropout=0.4, seeds=seeds)
    (turned,) = lora_linears(x.flip(0), group, dropout=0.4, seeds=seeds.flip(0))
    (alone,) = lora_linears(x[1:2], group, dropout=0.4, seeds=seeds[1:2])
    (shorter,) = lora_linears(x[:, :4], group, dropout=0.4, seeds=seeds)  # a batch with a shorter longest text
    torch.testing.assert_close(turned.flip(0), together)
    torch.testing.assert_close(alone, together[1:2])
    torch.testing.assert_close(shorter, together[:, :4])
    (other,) = lora_linears(x, group, dropout=0.4, seeds=seeds + 1)
    assert ((other - together).abs().amax((1, 2)) > 1e-3).all()
    mask = lora_linear.kept_inputs(seeds, (21, WIDTH), 0.4)
    plain_x = lora_linear.dropped(x, seeds, 0.4)
    torch.testing.assert_close(plain_x, x * mask.view(x.shape) / 0.6)
    assert torch.autograd.gradcheck(lambda x: lora_linear.dropped(x, seeds, 0.4), (x.requires_grad_(),))
    with pytest.raises(ValueError, match="20 rows cannot be shared out to 3 seeds"):
        lora_linears(random(20, WIDTH), group, dropout=0.4, seeds=seeds)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_against_finite_differences(dropout: float) -> None:
    group = projections()[:2]
    adapters = [t for p in group for t in (p.lora_a, p.lora_b)]

    def run(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        fed = [p._replace(lora_a=adapters[2 * i], lora_b=adapters[2 * i + 1]) for i, p in enumerate(group)]
        return lora_linears(x, fed, dropout=dropout)

    def refer(x: Tensor, *adapters: Tensor) -> tuple[Tensor, ...]:
        fed = [p._replace(lora_a=adapters[2 * i], lora_b=adapters[2 * i + 1]) for i, p in enumerate(group)]
        return tuple(plain(x, fed))

    x = random(2, 3, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *adapters), fast_mode=True)
    assert torch.autograd.gradcheck(refer, (x, *adapters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "dropout"), [("none", 0.0), ("none", 0.4), ("normed", 0.0), ("gelu", 0.4)])
def test_as_good_as_torch_in_the_same_dtype(kind: str, dropout: float, dtype: torch.dtype) -> None:
    assert_as_good(*everything(kind, dropout, dtype))


@pytest.mark.parametrize("mistake", ["scale", "mask", "pair"])
def test_planted_mistakes_fail(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor, group: list[Projection], source: Any, dropout: float) -> tuple[Tensor, ...]:
        if mistake == "scale":
            group = [p._replace(scale=1.1 * p.scale) for p in group]
        if mistake == "pair":
            source = source._replace(scale=source.shift, shift=source.scale)
        outputs = lora_linears(x, group, source=source, dropout=dropout)
        if mistake == "mask":  # dropped in the backward
            all_kept = lambda seed, shape, rate: torch.ones(shape, dtype=torch.bool)  # noqa: E731
            monkeypatch.setattr(lora_linear, "kept_inputs", all_kept)
        return outputs

    with pytest.raises(AssertionError, match="error .* limit"):
        assert_as_good(*everything("normed", 0.4, torch.float32, run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, WIDTH), (7, WIDTH)])
def test_without_an_update_it_is_the_base_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    group = [p._replace(lora_b=torch.zeros_like(p.lora_b).requires_grad_()) for p in projections(dtype, torch.float32)]
    for out, p in zip(lora_linears(x, group), group, strict=True):
        assert torch.equal(out, torch.nn.functional.linear(x, p.weight, p.bias))
    with torch.no_grad():
        for out, p in zip(lora_linears(x, group), group, strict=True):
            assert torch.equal(out, torch.nn.functional.linear(x, p.weight, p.bias)) and not out.requires_grad


def test_inputs_that_are_not_contiguous() -> None:
    x, group = random(WIDTH, 5, 2).permute(2, 1, 0).requires_grad_(), projections()
    leaves = {"x": x}
    ours = lora_linears(x, group)
    found, wanted = gradients(ours, leaves, group), gradients(plain(x, group), leaves, group)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-11, atol=1e-11)
    expanded = torch.autograd.grad([out.sum() for out in lora_linears(x, group)], x)[0]  # gradients of stride 0
    torch.testing.assert_close(expanded, torch.autograd.grad([out.sum() for out in plain(x, group)], x)[0])


def test_masters_stay_float32_and_get_float32_gradients() -> None:
    x = random(2, 5, WIDTH, dtype=torch.bfloat16).requires_grad_()
    group = projections(torch.bfloat16, torch.float32)
    found = gradients(lora_linears(x, group), {"x": x}, group)
    assert found["out0"].dtype == found["x"].dtype == torch.bfloat16
    assert found["lora_a0"].dtype == found["lora_b0"].dtype == torch.float32


def test_parts_of_a_group_may_go_unused_or_be_frozen() -> None:
    x, group = random(2, 5, WIDTH).requires_grad_(), projections()
    ours, theirs = lora_linears(x, group)[1], plain(x, group)[1]
    wanted = [x, group[1].lora_a, group[1].lora_b]
    pairs = zip(torch.autograd.grad(ours.sum(), wanted), torch.autograd.grad(theirs.sum(), wanted), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    out = lora_linears(x.detach(), group)[0]  # the first block's input needs none
    out.sum().backward()
    assert group[0].lora_a.grad is not None and group[1].lora_a.grad is None
    half = [group[0]._replace(lora_a=group[0].lora_a.detach())]
    out = lora_linears(x.detach(), half)[0]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), half[0].lora_b)[0], group[0].lora_b.grad)


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t is not None)


def test_it_saves_the_source_and_a_rank_wide_product_only() -> None:
    """In u = one hidden state in bfloat16; q, k and v of a block of Wan's proportions, rank 1/16 of the width."""
    rows, width, rank = 64, 256, 16
    peft = pytest.importorskip("peft.tuners.lora.layer")
    n = random(1, rows, width, dtype=torch.bfloat16).requires_grad_()
    unit = bytes_of(n)
    source = Normed(
        random(1, rows, width, seed=1, dtype=torch.bfloat16),
        *(torch.zeros(1, rows) for _ in range(2)),
        *(torch.zeros(1, 1, width) for _ in range(2)),
    )
    bases = [torch.nn.Linear(width, width, dtype=torch.bfloat16).requires_grad_(False) for _ in range(3)]
    table = {}
    for name, dtype, dropout in (
        ("peft", torch.float32, 0.0),
        ("peft, dropout", torch.float32, 0.1),
        ("peft, bf16 adapters", torch.bfloat16, 0.0),
    ):
        layers = [peft.Linear(b, "p", config(rank, dropout), r=rank, lora_alpha=rank) for b in bases]
        for layer in layers:
            layer.to(dtype=dtype).base_layer.to(torch.bfloat16)
        with (saved := SavedBytes()):
            outs = [layer(n) for layer in layers]
            parameters = bytes_of(*(p for layer in layers for key, p in layer.named_parameters() if "bias" not in key))
            table[name] = (saved.live - parameters) / unit
        del outs
    group = [
        Projection(
            b.weight, b.bias, torch.randn(rank, width).requires_grad_(), torch.randn(width, rank).requires_grad_(), 1.0
        )
        for b in bases
    ]
    parameters = bytes_of(*(t for p in group for t in (p.weight, p.lora_a, p.lora_b)))
    low = 3 * rank / width
    for name, given, dropout, expected in (
        ("x", None, 0.0, 1 + low),
        ("source", source, 0.0, bytes_of(*source) / unit + low),
        ("source, dropout", source, 0.1, (bytes_of(*source) + 8) / unit + low),
    ):
        with (saved := SavedBytes()):
            outs = lora_linears(n, group, source=given, dropout=dropout)
            table[name] = (saved.live - parameters) / unit
        assert table[name] == pytest.approx(expected, abs=1e-9), table
        del outs
    assert table["x"] < 0.45 * table["peft"], table
    assert table["source, dropout"] < 0.2 * table["peft, dropout"], table
    with (saved := SavedBytes()):
        outs = lora_linears(n, [p._replace(lora_a=p.lora_a.detach(), lora_b=p.lora_b.detach()) for p in group])
        assert saved.live == parameters  # nobody asks for dA or dB
    with torch.no_grad(), (saved := SavedBytes()):
        outs = lora_linears(n, group, source=source)
        assert saved.live == 0 and outs[0].grad_fn is None


def config(rank: int, dropout: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout)


@pytest.mark.parametrize("kind", ["x", "source"])
def test_no_temporary_is_as_large_as_the_input(kind: str) -> None:
    """On meta, where nothing is computed and the sizes are a GPU's."""
    rows, width, rank = 4096, 256, 8
    with torch.device("meta"):
        n = torch.empty(1, rows, width, dtype=torch.bfloat16, requires_grad=True)
        source = Normed(torch.empty_like(n), *torch.empty(2, 1, rows), *torch.empty(2, 1, 1, width))
        group = [
            Projection(
                torch.empty(width, width, dtype=torch.bfloat16), None,
                torch.empty(rank, width, requires_grad=True), torch.empty(width, rank, requires_grad=True), 1.0,
            )
            for _ in range(3)
        ]  # fmt: skip
        unit, small = bytes_of(n), 9 * bytes_of(n) * rank / width + 3 * width * width * 2
        with LiveBytes() as live:
            outs = lora_linears(n, group, source=source if kind == "source" else None)
            assert 3 * unit <= live.peak <= 3 * unit + small
            grads = [torch.empty_like(out) for out in outs]
            before = live.live
            torch.autograd.backward(outs, grads)
            assert unit <= live.peak - before <= unit + small  # the input's gradient


def test_what_the_source_holds_is_guarded() -> None:
    x = random(2, 5, WIDTH)
    kept = x.clone()
    out = lora_linears(torch.nn.functional.gelu(x, approximate="tanh"), projections(), source=Gelu(kept))[0]
    kept.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_gradient_reaches_what_the_source_came_from() -> None:
    """Not even zeros, which would run its backward once more for nothing."""

    class Never(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            return h.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise AssertionError("the source's backward ran")

    h = random(2, 5, WIDTH).requires_grad_()
    x = torch.nn.functional.gelu(h.detach(), approximate="tanh").requires_grad_()
    lora_linears(x, projections(), source=Gelu(Never.apply(h)))[0].sum().backward()
    assert x.grad is not None and h.grad is None


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(given: torch.dtype, inside: bool) -> None:
    """As ``F.linear`` under autocast, for float32 weights that compute in bfloat16; no cast weight is kept."""
    x = random(2, 5, WIDTH, dtype=given).requires_grad_()
    group = projections(torch.float32)
    low = [p._replace(weight=p.weight.bfloat16(), bias=None if p.bias is None else p.bias.bfloat16()) for p in group]
    wanted = gradients(lora_linears(x.bfloat16(), low), {"x": x}, group)
    with torch.autocast("cpu", torch.bfloat16):
        with (saved := SavedBytes()):
            outs = lora_linears(x, group)
            parameters = bytes_of(*(t for p in group for t in (p.weight, p.lora_a, p.lora_b)))
            assert saved.live == parameters + 2 * x.numel() + 2 * 10 * sum(RANKS)
        for out, p in zip(outs, group, strict=True):
            assert out.dtype == torch.bfloat16
            assert_near(out, plain(x, [p])[0].bfloat16(), terms=WIDTH)
        if inside:
            found = gradients(outs, {"x": x}, group)
    if not inside:
        found = gradients(outs, {"x": x}, group)
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert found["x"].dtype == given and found["lora_a0"].dtype == torch.float32
    exact = random(2, 5, WIDTH).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linears(exact, projections())[0].dtype == torch.float64  # autocast leaves it alone


def test_a_backward_under_autocast_of_a_forward_without() -> None:
    x, group = random(2, 5, WIDTH, dtype=torch.float32).requires_grad_(), projections(torch.float32)
    wanted = torch.autograd.grad(lora_linears(x, group)[0].sum(), x)[0]
    out = lora_linears(x, group)[0].sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out, x)[0]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["none", "normed"])
def test_checkpointing_draws_the_same_mask(kind: str) -> None:
    def run(x: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        n, source = arrive(kind, {"x": x, **dict(zip(("scale", "shift"), extra, strict=False))})
        return lora_linears(n, group, source=source, dropout=0.4)

    leaves, group = inputs(kind), projections()
    torch.manual_seed(5)
    wanted = gradients(run(*leaves.values()), leaves, group)
    torch.manual_seed(5)
    found = gradients(checkpoint(run, *leaves.values(), use_reentrant=False), leaves, group)
    torch.manual_seed(6)
    other = gradients(run(*leaves.values()), leaves, group)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not torch.equal(other["out0"], wanted["out0"])


def test_one_adapter_twice_in_a_chain() -> None:
    x = random(2, 5, WIDTH).requires_grad_()
    p = Projection(
        random(WIDTH, WIDTH, seed=1), None, random(2, WIDTH, seed=2).requires_grad_(),
        random(WIDTH, 2, seed=3).requires_grad_(), 0.7,
    )  # fmt: skip
    ours = lora_linears(lora_linears(x, [p])[0].tanh(), [p])
    theirs = plain(plain(x, [p])[0].tanh(), [p])
    found, wanted = gradients(ours, {"x": x}, [p]), gradients(theirs, {"x": x}, [p])
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dropout"), [("none", 0.0), ("normed", 0.4), ("gelu", 0.0)])
def test_compiled_whole(kind: str, dropout: float) -> None:
    def run(leaves: dict[str, Tensor], group: list[Projection]) -> tuple[Tensor, ...]:
        x, source = arrive(kind, leaves)
        return lora_linears(x, group, source=source, dropout=dropout)

    leaves, group = inputs(kind), projections()
    torch.manual_seed(7)
    wanted = gradients(run(leaves, group), leaves, group)
    torch.manual_seed(7)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    found = gradients(compiled(leaves, group), leaves, group)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_operators_are_registered_rightly(dropout: float) -> None:
    low, x, a = random(10, 3), random(2, 5, WIDTH), random(3, WIDTH)
    seed = torch.tensor(3) if dropout else None
    _, source = arrive("normed", inputs("normed"))
    parts = [part.detach() for part in source]
    torch.library.opcheck(lora_linear.lora_grad_a, (low, *parts, "Normed", seed, dropout))
    torch.library.opcheck(lora_linear.lora_grad_a, (low, x, None, None, None, None, "Gelu", seed, dropout))
    if seed is not None:
        rows = x.flatten(0, 1)
        torch.library.opcheck(lora_linear.lora_down, (rows, a, seed, dropout))
        torch.library.opcheck(lora_linear.dropped, (rows.requires_grad_(), seed, dropout))
        rows = rows.detach()
        torch.library.opcheck(lora_linear.lora_up_, (rows.clone(), low, a, seed, dropout))


def test_there_are_no_second_derivatives() -> None:
    x = random(2, 5, WIDTH).requires_grad_()
    first = torch.autograd.grad(lora_linears(x, projections())[0].square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    x, (p, *_) = random(2, 5, WIDTH), projections()
    source = Normed(x, x[..., 0], x[..., 0], x[:, :1], x[:, :1])
    for message, wrong in (
        (r"weight is \(10, 11\), not \(10, 12\)", {"weight": p.weight[:, 1:]}),
        ("weight requires a gradient", {"weight": p.weight.clone().requires_grad_()}),
        ("bias requires a gradient", {"bias": p.bias.clone().requires_grad_()}),
        (r"bias is \(9,\), not \(10,\)", {"bias": p.bias[1:]}),
        (r"lora_a is \(2, 11\), not \(2, 12\)", {"lora_a": p.lora_a[:, 1:]}),
        (r"lora_b is \(10, 1\), not \(10, 2\)", {"lora_b": p.lora_b[:, 1:]}),
        ("weight is torch.float32 and x torch.float64, without autocast", {"weight": p.weight.float()}),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linears(x, [p._replace(**wrong)])
    with pytest.raises(ValueError, match="there must be a projection"):
        lora_linears(x, [])
    with pytest.raises(ValueError, match="x must be"):
        lora_linears(x[None], [p])
    with pytest.raises(ValueError, match="below 1, not 1.0"):
        lora_linears(x, [p], dropout=1.0)
    for message, field, value in (
        (r"source: x is \(1, 5, 12\), not \(2, 5, 12\)", "x", x[:1]),
        (r"source: mean is \(2, 4\), not \(2, 5\)", "mean", x[:, 1:, 0]),
        (r"source: rstd is \(2, 5, 1\)", "rstd", x[..., :1]),
        (r"source: shift is \(1, 1, 12\), not .* or \(2, 1, 12\) or \(12,\)", "shift", x[:1, :1]),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linears(x, [p], source=source._replace(**{field: value}))
