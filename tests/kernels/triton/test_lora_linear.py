"""The Triton kernels of the low-rank branch: odd shapes, ragged tails, strides, masks, and offsets of 64 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from prfl_kernels import lora_linear_triton as kernels
from prfl_kernels.lora_linear import Gelu, Normed, Projection, lora_linears
from prfl_kernels.reference import modulated_layer_norm
from tests.kernels.checks import assert_as_good, random

EPS = 1e-6


def rebuilt(kind: str, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
    """The input that the kernel rebuilds, by torch."""
    if kind == "Gelu":
        return torch.nn.functional.gelu(x, approximate="tanh")
    return modulated_layer_norm(x, parts[2], parts[3], EPS) if kind == "Normed" else x


def norm_of(x: Tensor, modulation: str, strided: bool) -> tuple[Tensor, ...]:
    """mean, rstd, scale, shift; strided: chunks of one time embedding, as in Wan's blocks."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    batch, tokens, width = x.shape
    mean, rstd = wide.mean(-1), (wide.var(-1, correction=0) + EPS).rsqrt()
    if modulation == "affine":
        given = [random(width, seed=i, dtype=wide.dtype, device=x.device) for i in (2, 3)]
    else:
        rows = tokens if modulation == "per token" else 1
        both = random(batch, rows, 2 * width, seed=2, dtype=wide.dtype, device=x.device)
        given = list(both.chunk(2, -1))
        if not strided:
            given = [each.contiguous() for each in given]
    return mean, rstd, *given


def assert_grad_a(kind: str, x: Tensor, parts: tuple[Tensor, ...], low: Tensor) -> None:
    blank = parts or (None,) * 4
    ours = kernels.grad_a(low, x, *blank, kind, None, 0.0)
    wide = [part.double() for part in parts]
    exact = low.double().T @ rebuilt(kind, x.double(), tuple(wide)).flatten(0, -2)
    torchs = (low.T @ rebuilt(kind, x, parts).flatten(0, -2)).to(ours.dtype)
    assert_as_good({"lora_a": ours}, {"lora_a": torchs}, {"lora_a": exact})
    assert torch.equal(ours, kernels.grad_a(low, x, *blank, kind, None, 0.0))  # no order of adding is left to chance


@pytest.mark.parametrize(
    ("shape", "rank", "modulation"),
    [
        ((1, 65, 130), 3, "sample"),  # a ragged tail of rows and of columns
        ((3, 37, 20), 5, "sample"),  # samples end within a tile
        ((2, 70, 9), 2, "per token"),
        ((2, 33, 6), 17, "affine"),
        ((2, 1, 8), 1, "sample"),
        ((1, 40, 6), 130, "sample"),  # more ranks than a tile
    ],
)
def test_grad_a_of_a_normed_input(
    shape: tuple[int, ...], rank: int, modulation: str, dtype: torch.dtype, device: str
) -> None:
    x = random(*shape, seed=1, dtype=dtype, device=device)
    low = random(shape[0] * shape[1], rank, seed=4, dtype=dtype, device=device)
    parts = norm_of(x, modulation, strided=True)
    assert_grad_a("Normed", x, parts, low)
    if shape[0] == 1:  # the same as rows without a batch
        flat = kernels.grad_a(low, x[0], *(part[0] for part in parts), "Normed", None, 0.0)
        assert torch.equal(flat, kernels.grad_a(low, x, *parts, "Normed", None, 0.0))


@pytest.mark.parametrize("kind", ["Normed", "Gelu"])
@pytest.mark.parametrize("strides", ["rows apart", "transposed"])
def test_inputs_that_are_not_contiguous(kind: str, strides: str, dtype: torch.dtype, device: str) -> None:
    if strides == "rows apart":
        x = random(2, 14, 40, seed=1, dtype=dtype, device=device)[:, ::2, 3:21]
    else:
        x = random(18, 2, 7, seed=1, dtype=dtype, device=device).permute(1, 2, 0)
    assert not x.is_contiguous()
    low = random(28, 6, seed=4, dtype=dtype, device=device)[::2, ::2]
    assert_grad_a(kind, x, norm_of(x, "sample", strided=False) if kind == "Normed" else (), low)


@pytest.mark.parametrize("shape", [(2, 66, 10), (71, 133)])
def test_grad_a_of_a_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = random(*shape, seed=1, dtype=dtype, device=device)
    assert_grad_a("Gelu", x, (), random(x.numel() // shape[-1], 4, seed=4, dtype=dtype, device=device))


@pytest.mark.parametrize("size", [30.0, 1e15])
def test_a_gelu_far_from_zero(size: float, device: str) -> None:
    """Where the exponent overflows on one side and vanishes on the other."""
    x = size * random(2, 66, 10, seed=1, dtype=torch.float32, device=device)
    assert_grad_a("Gelu", x, (), random(132, 4, seed=4, dtype=torch.float32, device=device))


def test_many_chunks_add_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk's own rows, none twice: where the sum is split differently it is the same."""
    x, low = random(2, 200, 7, dtype=torch.float64, device=device), random(400, 2, seed=1, device=device)
    parts = norm_of(x, "sample", strided=False)
    found = []
    for programs in (1, 2, 6, 528):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        found.append(kernels.grad_a(low, x, *parts, "Normed", None, 0.0))
        torch.testing.assert_close(found[-1], low.T @ rebuilt("Normed", x, parts).flatten(0, 1), rtol=1e-11, atol=1e-11)
    assert kernels._chunks(2, 200, 1) == (64, 4)


def test_wider_columns_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, low = random(2, 70, 300, dtype=torch.float64, device=device), random(140, 20, seed=1, device=device)
    parts = norm_of(x, "sample", strided=False)
    monkeypatch.setattr(kernels, "COLUMNS", 256)
    for kind, given in (("Normed", parts), ("Gelu", ())):
        found = kernels.grad_a(low, x, *(given or (None,) * 4), kind, None, 0.0)
        torch.testing.assert_close(found, low.T @ rebuilt(kind, x, given).flatten(0, 1), rtol=1e-11, atol=1e-11)


def mask_of(rows: int, width: int, seed: Tensor, dropout: float, device: str) -> Tensor:
    """What ``down`` keeps: its product with the identity is the mask."""
    ones, identity = torch.ones(rows, width, device=device), torch.eye(width, device=device)
    found = kernels.down(ones, identity, seed, dropout) * (1 - dropout)
    assert ((found - 1).abs() < 1e-6).logical_or(found == 0).all()
    return found > 0.5


@pytest.mark.parametrize(("rows", "width", "rank"), [(67, 133, 3), (5, 9, 18)])
def test_the_mask_is_one_in_all_three_kernels(
    rows: int, width: int, rank: int, dtype: torch.dtype, device: str
) -> None:
    seed, dropout = torch.tensor(2**62 + 12345, device=device), 0.3
    mask = mask_of(rows, width, seed, dropout, device)
    x, a = random(rows, width, dtype=dtype, device=device), random(rank, width, seed=1, dtype=dtype, device=device)
    low = random(rows, rank, seed=2, dtype=dtype, device=device)
    grad_x = random(rows, width, seed=3, dtype=dtype, device=device)

    def by_torch(x: Tensor, a: Tensor, low: Tensor, grad_x: Tensor) -> dict[str, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dropped = x * mask / (1 - dropout)
        return {
            "down": dropped @ a.T,
            "up": grad_x + (low @ a) * mask / (1 - dropout),
            "grad_a": (low.T @ dropped).to(wide),
        }

    ours = {"down": kernels.down(x, a, seed, dropout)}
    ours["grad_a"] = kernels.grad_a(low, x, None, None, None, None, "NoneType", seed, dropout)
    torchs, exact = by_torch(x, a, low, grad_x), by_torch(x.double(), a.double(), low.double(), grad_x.double())
    kernels.up(grad_x, low, a, seed, dropout)
    assert_as_good({**ours, "up": grad_x}, torchs, exact)
    ours["grad_a"] = kernels.grad_a(low, x, None, None, None, None, "NoneType", seed + 1, dropout)
    with pytest.raises(AssertionError, match="^grad_a: error"):  # another mask is found out
        assert_as_good({**ours, "up": grad_x}, torchs, exact)


def test_a_small_card_has_fewer_tiles_on_their_way(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """99 KB of shared memory do not hold three of 128 ranks; the numbers are the same."""
    stages = []
    kind = type(kernels._down)
    launch = kind.__getitem__

    def watched(kernel, grid):
        run = launch(kernel, grid)
        return lambda *args, num_stages, **more: (stages.append(num_stages), run(*args, num_stages=num_stages, **more))

    monkeypatch.setattr(kind, "__getitem__", watched)
    x, a = (random(*size, seed=4, dtype=torch.float16, device=device) for size in ((70, 40), (128, 40)))
    found = []
    for limit in (227, 99):
        monkeypatch.setattr(kernels, "_shared", lambda _, limit=limit: limit * 1024)
        found.append(kernels.down(x, a, torch.tensor(3, device=device), 0.3))
    assert stages == [3, 2] and torch.equal(*found)


def test_a_row_is_masked_by_its_seed(device: str) -> None:
    """Samples that end within a tile: each has the mask that it has alone."""
    seeds = torch.tensor([7, 2**62 + 1, -5], device=device)
    together = mask_of(3 * 37, 20, seeds, 0.3, device)
    for part, seed in zip(together.split(37), seeds, strict=True):
        assert torch.equal(part, mask_of(37, 20, seed, 0.3, device))
    low, x = random(3 * 37, 3, seed=2, device=device), random(3, 37, 20, device=device)
    ours = kernels.grad_a(low, x, None, None, None, None, "NoneType", seeds, 0.3)
    torch.testing.assert_close(ours, low.T @ (x.flatten(0, 1) * together / 0.7), rtol=1e-5, atol=1e-5)
    grad_x, a = random(3 * 37, 20, seed=3, device=device), random(3, 20, seed=1, device=device)
    wanted = grad_x + (low @ a) * together / 0.7
    kernels.up(grad_x, low, a, seeds, 0.3)
    torch.testing.assert_close(grad_x, wanted, rtol=1e-5, atol=1e-5)


def test_the_mask_is_random(device: str) -> None:
    """Its share, no two rows, columns or seeds alike, and the high half of the seed counts."""
    seeds = [torch.tensor(each, device=device) for each in (1, 2, 1 + 2**40)]
    masks = [mask_of(256, 128, seed, 0.25, device) for seed in seeds]
    for mask in masks:
        assert abs(mask.float().mean().item() - 0.75) < 0.012  # 5 deviations
        assert len(mask.unique(dim=0)) == 256 and mask.unique(dim=1).shape[1] == 128
    assert abs((masks[0] == masks[1]).float().mean().item() - 0.625) < 0.015
    assert abs((masks[0] == masks[2]).float().mean().item() - 0.625) < 0.015
    assert torch.equal(masks[0], mask_of(256, 128, seeds[0], 0.25, device))


@pytest.mark.parametrize(("kind", "dropout"), [("normed", 0.0), ("gelu", 0.3), ("none", 0.3)])
def test_the_whole_operation(kind: str, dropout: float, dtype: torch.dtype, device: str) -> None:
    """Grouped and with float32 masters, against torch in the same dtype and in float64."""
    torch.manual_seed(0)
    batch, tokens, width = 2, 5, 12
    raw = random(batch, tokens, width, seed=1, dtype=dtype, device=device)
    source: Any = Gelu(raw) if kind == "gelu" else None
    if kind == "normed":
        source = Normed(raw, *norm_of(raw, "sample", strided=True))
    x = rebuilt(type(source).__name__, raw, tuple(source or ())[1:]).requires_grad_()
    masters = torch.promote_types(dtype, torch.float32)
    group = [
        Projection(
            random(out, width, seed=10, dtype=dtype, device=device), None,
            random(rank, width, seed=11, dtype=masters, device=device).requires_grad_(),
            random(out, rank, seed=12, dtype=masters, device=device).requires_grad_(), 0.7,
        )
        for out, rank in ((10, 2), (6, 3))
    ]  # fmt: skip
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    mask = torch.ones(batch, tokens, width, dtype=torch.bool, device=device)
    if dropout:
        seed = torch.randint(2**63 - 1, (), device=device)
        mask = mask_of(batch * tokens, width, seed, dropout, device).view_as(mask)
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])

    def gradients(run: Any, x: Tensor, group: list[Projection]) -> dict[str, Tensor]:
        outs = run(x, group)
        wanted = {"x": x} | {f"{n}{i}": p[at] for i, p in enumerate(group) for n, at in (("a", 2), ("b", 3))}
        loss = sum((out * random(*out.shape, seed=5 + i, device=device).to(out)).sum() for i, out in enumerate(outs))
        found = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        return found | {f"out{i}": out.detach() for i, out in enumerate(outs)}

    def plain(x: Tensor, group: list[Projection]) -> list[Tensor]:
        dropped = x * mask / (1 - dropout)
        return [x @ w.T + scale * (dropped @ a.to(x.dtype).T) @ b.to(x.dtype).T for w, _, a, b, scale in group]

    wide = [
        Projection(
            p.weight.double(), None, p.lora_a.detach().double().requires_grad_(),
            p.lora_b.detach().double().requires_grad_(), p.scale,
        )
        for p in group
    ]  # fmt: skip
    ours = gradients(lambda x, group: lora_linears(x, group, source=source, dropout=dropout), x, group)
    if dtype.itemsize == 2:  # what is summed in float32 is not rounded on its way to the master
        assert not torch.equal(ours["a0"], ours["a0"].to(dtype).float())
    assert_as_good(
        ours,
        gradients(plain, x, group),
        gradients(plain, x.detach().double().requires_grad_(), wide),
    )


@pytest.mark.parametrize("kernel", ["grad_a", "down", "up"])
def test_offsets_beyond_32_bits(kernel: str, device: str) -> None:
    """Rows so far apart that the third begins at 2^31, as within three 720p videos: 3 x 75600 x 13824 elements.

    The memory between the rows is never touched, so that none is spent on it on a CPU.
    """
    assert 3 * 75600 * 13824 > 2**31
    width, apart = 20, 2**30
    x = torch.empty(2 * apart + width, dtype=torch.float16, device=device).as_strided((3, width), (apart, 1))
    x.copy_(random(3, width, dtype=torch.float16))
    a, low = random(2, width, seed=1, dtype=x.dtype, device=device), random(3, 2, seed=2, dtype=x.dtype, device=device)
    seed, near = torch.tensor(1, device=device), x.contiguous()
    if kernel == "grad_a":
        found = [kernels.grad_a(low, each, None, None, None, None, "Gelu", None, 0.0) for each in (x, near)]
    elif kernel == "down":
        found = [kernels.down(each, a, seed, 0.5) for each in (x, near)]
    else:
        kernels.up(x, low, a, seed, 0.5)
        before = near.clone()
        kernels.up(near, low, a, seed, 0.5)
        found = [x, near]
        assert not torch.equal(near, before)
    assert torch.equal(*found)
