"""Every operation that has Triton kernels, forward and backward on few tokens: for what holds of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prfl_kernels.attention import attention
from prfl_kernels.gated_residual_norm import gated_residual, gated_residual_norm
from prfl_kernels.lora_linear import Gelu, Projection, lora_linears
from prfl_kernels.qk_norm_rope import qk_norm_rope
from tests.kernels.checks import random

WIDTH, HEADS = 32, 2
Leaves = Mapping[str, Tensor]


def attend(own: Leaves) -> Sequence[Tensor]:
    return [attention(*(own[name].unflatten(-1, (HEADS, -1)) for name in ("x", "keys", "values")))]


def norm_and_rotate(own: Leaves) -> Sequence[Tensor]:
    x = own["x"]
    pairs = torch.arange(x.shape[1], device=x.device)[:, None] * torch.ones(WIDTH // HEADS, device=x.device)
    tables = [table(pairs)[None, :, None] for table in (torch.cos, torch.sin)]
    weight = torch.full((WIDTH,), 0.7, device=x.device, dtype=x.dtype)
    outs = qk_norm_rope(x, own["y"], weight, weight, *tables, HEADS, from_output=True)
    assert outs[1] is not None
    return outs[0], outs[1]


def gate_and_norm(own: Leaves) -> Sequence[Tensor]:
    return gated_residual_norm(*(own[name] for name in ("x", "y", "gate", "scale", "shift")))[:2]


def norm(own: Leaves) -> Sequence[Tensor]:
    return [gated_residual_norm(own["x"], None, None, own["scale"], own["shift"]).normed]


def gate(own: Leaves) -> Sequence[Tensor]:
    return [gated_residual(own["x"], own["y"], own["gate"])]


def low_rank(own: Leaves, dropout: float = 0.0) -> Sequence[Tensor]:
    # By torch's operations on the device, which a compiled function and a captured graph may hold.
    numbers = torch.arange(6 * WIDTH, dtype=torch.float32, device=own["x"].device).sin()
    weight = numbers.reshape(6, WIDTH).to(own["x"].dtype)
    projection = Projection(weight, None, own["lora_a"], own["lora_b"], 0.5)
    gelu = torch.nn.functional.gelu(own["x"], approximate="tanh")
    return lora_linears(gelu, [projection], source=Gelu(own["x"]), dropout=dropout)


def low_rank_dropped(own: Leaves) -> Sequence[Tensor]:
    return low_rank(own, dropout=0.3)


OPERATIONS: dict[str, tuple[Callable[[Leaves], Sequence[Tensor]], tuple[str, ...]]] = {
    "attention": (attend, ("x", "keys", "values")),
    "qk_norm_rope": (norm_and_rotate, ("x", "y")),
    "gated_residual_norm": (gate_and_norm, ("x", "y", "gate", "scale", "shift")),
    "norm alone": (norm, ("x", "scale", "shift")),
    "gate alone": (gate, ("x", "y", "gate")),
    "lora_linears": (low_rank, ("x", "lora_a", "lora_b")),
    "dropout": (low_rank_dropped, ("x", "lora_a", "lora_b")),
}

SEEDLESS = [name for name in OPERATIONS if name != "dropout"]  # whose seed is drawn anew


def plain_and_compiled(name: str, given: Leaves, **options: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each output and gradient as the operation has it, and as a compiled function has.  options: of compile."""
    results = []
    for run in (OPERATIONS[name][0], torch.compile(OPERATIONS[name][0], fullgraph=True, **options)):
        outs = run(given)
        results.append([*outs, *torch.autograd.grad(outs, [*given.values()], [torch.ones_like(out) for out in outs])])
    yield from zip(*results, strict=True)


def leaves(name: str, device: str, dtype: torch.dtype, tokens: int = 5) -> dict[str, Tensor]:
    shapes = {"x": (2, tokens, WIDTH), "y": (2, tokens, WIDTH), "keys": (2, 3, WIDTH), "values": (2, 3, WIDTH)}
    shapes |= dict.fromkeys(("gate", "scale", "shift"), (2, 1, WIDTH)) | {"lora_a": (4, WIDTH), "lora_b": (6, 4)}
    return {
        each: random(*shapes[each], seed=at, dtype=dtype, device=device).requires_grad_()
        for at, each in enumerate(OPERATIONS[name][1])
    }


def computed(name: str, given: Leaves) -> dict[str, Tensor]:
    """Outputs, and the gradients of their sum times fixed numbers."""
    outs = OPERATIONS[name][0](given)
    sides = [random(*out.shape, seed=20 + at, device=str(out.device)).to(out) for at, out in enumerate(outs)]
    grads = torch.autograd.grad(outs, [*given.values()], sides)
    return {**{f"out {at}": out.detach() for at, out in enumerate(outs)}, **dict(zip(given, grads, strict=True))}
