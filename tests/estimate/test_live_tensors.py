"""The counter against counts made by hand, and ``meta`` against a real device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prfl.estimate.live_tensors import LiveBytes, fused_on_meta

MIB = 1 << 20


def block(device: str) -> Tensor:
    return torch.ones(512, 512, device=device)  # 1 MiB


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_lives_and_what_lived(device: str) -> None:
    given = block(device)
    with LiveBytes() as counted:
        first = given + 1
        second = (first * 2).view(-1) + 3  # the product is freed, its view with it
        assert counted.live == 2 * MIB and counted.peak == 3 * MIB
        second.add_(first.view(-1))
        del first
        assert counted.live == MIB
    assert second.numel() == 512 * 512


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_keeps(device: str) -> None:
    leaf = block(device).requires_grad_()
    with LiveBytes() as counted:
        result = leaf.exp().sin().sum()  # exp keeps its output, sin its input: the same tensor
        assert counted.live == MIB + 4
        result.backward()
        del result
    assert counted.live == MIB, "the leaf's gradient"


@pytest.mark.parametrize("masked", [False, True])
def test_meta_keeps_of_attention_what_a_cpu_keeps(masked: bool) -> None:
    """Not a matrix of tokens x tokens."""
    kept = {}
    for device in ("cpu", "meta"):
        q, k, v = (torch.ones(1, 2, 256, 16, device=device, requires_grad=True) for _ in range(3))
        mask = torch.zeros(1, 1, 1, 256, device=device) if masked else None
        with fused_on_meta("cpu"), LiveBytes() as counted:
            result = F.scaled_dot_product_attention(q, k, v, mask)
            kept[device] = counted.live
            assert result.requires_grad
    assert kept["meta"] == kept["cpu"] < 256 * 256 * 4


def test_the_functions_are_put_back() -> None:
    before = F.scaled_dot_product_attention, F.rms_norm
    with pytest.raises(ZeroDivisionError), fused_on_meta("cuda"):
        assert F.scaled_dot_product_attention is not before[0] and F.rms_norm is not before[1]
        raise ZeroDivisionError
    assert (F.scaled_dot_product_attention, F.rms_norm) == before


def test_a_gpu_keeps_less_of_an_rms_norm() -> None:
    kept = {}
    for device in ("cpu", "cuda"):
        x = torch.ones(64, 512, device="meta", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(512, device="meta", dtype=torch.bfloat16)
        with fused_on_meta(device), LiveBytes() as counted:
            result = F.rms_norm(x * 1, (512,), weight, 1e-6)
            kept[device] = counted.live - result.nbytes
    assert kept["cuda"] == 64 * 512 * 2 + 2 * 64 * 4 < kept["cpu"], "its input, and two numbers a row"


def test_what_is_remembered_is_what_torch_works_out() -> None:
    """The first time, and again: sizes, strides, types, and which results share memory with an input."""
    tall, whole = torch.ones(4, 6, device="meta"), torch.ones(4, 6, dtype=torch.int64, device="meta")
    weight, square = torch.ones(6, device="meta", requires_grad=True), torch.ones(6, 6, device="meta")
    calls = [
        lambda: whole + 1, lambda: whole + 1.0, lambda: whole + whole.T.T, lambda: tall.exp(), lambda: tall.T.exp(),
        lambda: tall[:, ::2].exp(), lambda: tall.view(-1), lambda: torch.ops.aten._unsafe_view(tall, [24]),
        lambda: tall.to(torch.bfloat16) @ tall.T.to(torch.bfloat16), lambda: torch.var_mean(tall, 1),
        lambda: tall.max(1), lambda: tall.split(2), lambda: torch.cat([tall, tall]), lambda: torch.cat([tall, tall], 1),
        lambda: F.layer_norm(tall, (6,), weight), lambda: F.gelu(tall), lambda: F.gelu(tall, approximate="tanh"),
        lambda: torch.autograd.grad(F.layer_norm(tall, (6,), weight).sum(), weight),
        lambda: tall.add_(tall), lambda: tall.add_(tall[:, :1]), lambda: torch.polar(tall, tall),
        lambda: torch.ones(4, 6, device="meta").addmm_(tall, square), lambda: torch.ones(4, device="meta").resize_(6),
        lambda: torch.add(tall, tall, out=torch.ones(4, 6, device="meta")),
    ]  # fmt: skip

    def described(call: Callable[[], Any]) -> list[tuple]:
        result = call()
        tensors = [result] if isinstance(result, Tensor) else result
        shared = tall.untyped_storage()._cdata
        return [(t.shape, t.stride(), t.dtype, t.untyped_storage()._cdata == shared) for t in tensors]

    expected = [described(call) for call in calls]
    with LiveBytes():
        for _ in range(2):
            assert [described(call) for call in calls] == expected
