"""The counter against counts made by hand, and ``meta`` against a real device."""

from __future__ import annotations

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
