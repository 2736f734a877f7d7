"""What holds of every Triton kernel: no tokens, the device of its tensors, compiled and captured graphs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from prfl_kernels import attention_triton
from prfl_kernels.dispatch import interpreting
from tests.kernels.operations import OPERATIONS, SEEDLESS, computed, leaves, plain_and_compiled

compiled = pytest.mark.skipif(interpreting(), reason="needs a GPU: what is launched, not what is computed")
LAUNCHED = {  # kernels
    "attention": {"_forward", "_query_gradient", "_key_gradient"},
    "qk_norm_rope": {"_forward", "_backward"},
    "gated_residual_norm": {"forward_kernel", "backward_kernel"},
    "norm alone": {"forward_kernel", "backward_kernel"},
    "gate alone": {"forward_kernel", "backward_kernel"},
    "lora_linears": {"_grad_a"},
    "dropout": {"_grad_a", "_down", "_up"},
}


class Guard:
    """In the place of ``torch.cuda.device_of``."""

    entered = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        assert tensor.numel()

    def __enter__(self) -> None:
        Guard.entered += 1

    def __exit__(self, *error: object) -> None:
        Guard.entered -= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_launch_is_on_the_device_of_its_tensors(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []
    kind = type(attention_triton._forward)
    launch = kind.__getitem__

    def watched(kernel, grid):
        launches.append((kernel.fn.__name__, Guard.entered))
        return launch(kernel, grid)

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(kind, "__getitem__", watched)
    computed(name, leaves(name, device, torch.float32))
    assert set(launches) == {(kernel, 1) for kernel in LAUNCHED[name]}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)  # dropout's
        found.append(computed(name, leaves(name, device, torch.bfloat16)))
    for each, value in found[0].items():
        assert torch.equal(value.cpu(), found[1][each].cpu()), each


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_tokens(name: str, device: str) -> None:
    for each, value in computed(name, leaves(name, device, torch.float32, tokens=0)).items():
        assert value.numel() == 0 or not value.any(), each


@compiled
@pytest.mark.parametrize("name", SEEDLESS)
def test_compiled_by_inductor(name: str) -> None:
    """The kernels inside a compiled function, without a break of the graph; what is around them rounds otherwise."""
    for plain, fast in plain_and_compiled(name, leaves(name, "cuda", torch.bfloat16, tokens=70)):
        assert (plain - fast).abs().max() <= 2**-6 * plain.abs().max()


@compiled
@pytest.mark.parametrize("name", SEEDLESS)
def test_captured_in_a_graph(name: str) -> None:
    """Forward and backward replayed on other numbers in the same places."""
    given = leaves(name, "cuda", torch.bfloat16, tokens=70)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and warms up autograd
        computed(name, given)
    torch.cuda.current_stream().wait_stream(stream)
    sides = [torch.ones_like(out) for out in OPERATIONS[name][0](given)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = OPERATIONS[name][0](given)
        held = [*outs, *torch.autograd.grad(outs, [*given.values()], sides)]
    with torch.no_grad():
        for x in given.values():
            x.mul_(0.5)
    graph.replay()
    outs = OPERATIONS[name][0](given)
    fresh = [*outs, *torch.autograd.grad(outs, [*given.values()], sides)]
    for replayed, one in zip(held, fresh, strict=True):
        assert torch.equal(replayed, one)
