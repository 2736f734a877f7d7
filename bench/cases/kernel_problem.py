"""What the kernels' cases share: shapes, inputs, names of providers, a problem of functions of the same leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.problem import Outputs, Problem, Work, differentiated
from prfl_kernels.builds import SHAPES, Shape
from prfl_kernels.dispatch import interpreting

DTYPE = torch.bfloat16
OURS, EAGER, COMPILED, LIGER, CEILING = "ours", "eager", "torch.compile", "liger", "ceiling"
REBUILT, PEFT, PEFT_HALF, OURS_COMPILED = "ours, input rebuilt", "peft", "peft bf16", "ours, compiled"
WORLDS: Mapping[str, tuple[Shape, ...]] = {
    "tiny": (Shape("tiny", 80, 128, 4, 512),),  # the shapes world's
    "small": (Shape("small", 320, 768, 12, 3072),),  # 12 blocks are about 100 M parameters
    "wan-1.3b": SHAPES[:1],
    "wan-14b": SHAPES[1:],
}
TEXT = 512  # Wan's text tokens


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape_of(world: str, tokens: int) -> Shape:
    return next(shape for shape in WORLDS[world] if shape.tokens == tokens)


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Draw normal numbers, where they are used, and rounded to DTYPE whatever ``dtype`` is."""
    where = device()
    drawn = torch.randn(*shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    return drawn.mul_(scale).to(DTYPE).to(dtype)


def names() -> dict[str, str]:
    """Rename our providers where there is no GPU: their operations run as torch, and the results say so."""
    if torch.cuda.is_available() or interpreting():
        return {}
    return {name: name.replace("ours", "ours (torch path)") for name in (OURS, REBUILT, OURS_COMPILED)}


Call = Callable[[Outputs], Outputs]


def operation(
    calls: Mapping[str, Callable[[], Call]],
    plain: Call,
    leaves: Outputs,
    upstream: Outputs,
    mode: str,
    constant: Sequence[Tensor] = (),
    **more: Any,
) -> Problem:
    """Build a problem whose providers are functions of the same leaves.

    calls: what makes each provider's function, when it is wanted.  plain: the formula in torch, which is the provider
    "eager", compiled "torch.compile", and in float64 the exact result.
    """

    def work(make: Callable[[], Call]) -> Work:
        call = make()
        return differentiated(lambda: call(leaves), leaves, upstream, mode, constant)

    def exact() -> Outputs:
        wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        grads = {name: grad.double() for name, grad in upstream.items()}
        double_work = differentiated(lambda: plain(wide), wide, grads, mode)
        result = double_work.run(double_work.before())
        assert result is not None
        return {name: value.detach() for name, value in result.items()}

    all_calls = {EAGER: lambda: plain, COMPILED: lambda: torch.compile(plain, dynamic=False), **calls}
    works: dict[str, Callable[[], Work]] = {name: partial(work, make) for name, make in all_calls.items()}
    works |= more.pop("works", {})
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    return Problem(works, EAGER, DTYPE, exact, shapes=shapes, names=names(), **more)


def copy(moved: float) -> Work:
    """Prepare the ceiling of what memory bounds: a plain copy of as many bytes, read and written."""
    source = torch.empty(int(moved / 2), dtype=torch.int8, device=device())
    target = torch.empty_like(source)

    def run(_: Any) -> None:
        target.copy_(source)

    return Work(run)


def products(x: Tensor, weights: Sequence[Tensor], mode: str) -> Work:
    """Prepare the ceiling of what products bound: those of frozen layers alone."""
    x = x.detach().requires_grad_()
    upstream = {str(i): random(*x.shape[:-1], len(weight), seed=50 + i) for i, weight in enumerate(weights)}

    def call() -> Outputs:
        return {str(i): nn.functional.linear(x, weight) for i, weight in enumerate(weights)}

    return silent(differentiated(call, {"x": x}, upstream, mode, weights))


def silent(work: Work) -> Work:
    """Drop a provider's outputs: it is timed like any other, and compared with none."""

    def run(prepared: Any) -> None:
        work.run(prepared)

    return work._replace(run=run)


def share(mode: str, forward: float, backward: float) -> float:
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin (1, T, 1, C) of Wan's form, each value twice; a line of tokens will do for a benchmark."""
    angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, channels, 2) / channels))
    table = angles.repeat_interleave(2, 1)[None, :, None].to(device(), torch.float32)
    return table.cos(), table.sin()
