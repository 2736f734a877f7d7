"""The tiles of the kernels beside others that are a constant's matter: a part of bench/ten_minutes.py.

Attention's tiles of queries and keys; wider columns of the input where LoRA sums A's gradient; more tokens a program
where norms and gates are limited by memory.  The first of each is the one in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

TILES = {  # of attention, beside the chosen ones: queries, keys, warps, stages
    "forward": ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3)),
    "query_gradient": ((128, 64, 8, 2), (64, 64, 4, 2)),
    "key_gradient": ((32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 4, 2)),
}
COLUMNS = 128, 256  # of lora_linear_triton
ELEMENTS = 2048, 4096, 8192  # of qk_norm_rope_triton: 1, 2 and 4 tokens of the small model a program
ROWS = 1, 2, 4  # of gated_residual_norm_triton
RANK = 64  # up to it the columns of a tile may be 256

Sweep = Callable[..., None]


def best(call: Callable[[], Any], device: str, runs: int = 10) -> float:
    """Return the median of a few runs, in seconds."""
    import torch

    from bench.harness.measure import quantiles, timed
    from bench.harness.problem import Work

    def run(_: Any) -> None:
        call()

    work = Work(run)
    for _ in range(3):
        timed(work, torch.device(device))
    return quantiles([timed(work, torch.device(device)) for _ in range(runs)])[0]


def tiles(world: str, emit: Callable[..., None], clock: Any) -> None:
    """Sweep over the small model's shapes (world: of bench.cases.kernel_problem), one kernel after another."""
    import torch

    if not torch.cuda.is_available():
        emit(row="tiles", failed="needs a GPU: they are of compiled kernels")
        return
    from bench.cases.kernel_problem import WORLDS

    for kernels in (attention_tiles, lora_columns, tokens_a_program):
        kernels(WORLDS[world][0], partial(sweep, emit, clock))


def sweep(
    emit: Callable[..., None],
    clock: Any,
    name: str,
    values: Sequence[Any],
    using: Callable[[Any], AbstractContextManager],
    call: Callable[[], Any],
    **amount: float,
) -> None:
    """Measure a row for each of the values, of which the first is in use.

    using(value): a context in which that value is in use.
    amount: what a call does, in the unit that its rate is told in: ``tflops=...`` or ``gb_per_s=...``.
    """
    for value in dict.fromkeys(values):
        if clock.left() < 5:
            emit(row=f"tiles-{name}-{value}", failed="no time was left")
            continue
        try:
            with using(value):
                seconds = best(call, "cuda", runs=5)
        except Exception as error:  # too much shared memory, say
            emit(row=f"tiles-{name}-{value}", failed=f"{type(error).__name__}: {error}"[:300])
            continue
        rates = {unit: each / seconds for unit, each in amount.items()}
        emit(row=f"tiles-{name}-{value}", seconds=seconds, chosen=value == values[0], **rates)


def attention_tiles(shape: Any, sweep: Sweep) -> None:
    import torch

    from bench.cases.kernel_problem import random
    from prfl_kernels import attention_triton as source

    size = (1, shape.tokens, shape.heads, shape.width // shape.heads)
    query, key, value, grad = (random(*size, seed=seed) for seed in range(4))
    out, d_query, d_key, d_value = (torch.empty_like(query) for _ in range(4))
    lse = torch.empty(1, shape.heads, shape.tokens, device=query.device)
    delta, scale = torch.empty_like(lse), size[-1] ** -0.5
    calls: dict[Any, tuple[int, Callable[[], None]]] = {  # kernel: matrix products, and the launch
        source._forward: (2, lambda: source.forward(query, key, value, None, out, lse, scale)),
        source._query_gradient: (
            3, lambda: source.query_gradient(grad, query, key, value, None, out, lse, d_query, delta, scale),
        ),
        source._key_gradient: (
            4, lambda: source.key_gradient(grad, query, key, value, None, lse, delta, d_key, d_value, scale),
        ),
    }  # fmt: skip
    major = torch.cuda.get_device_capability()[0]
    chosen = source.HALF_TILES.get(major, source.HALF_TILES[8])
    for kernel, (products, call) in calls.items():
        name = kernel.fn.__name__.strip("_")

        def using(tiles: tuple[int, ...], kernel: Any = kernel) -> AbstractContextManager:
            return patch.dict(source.HALF_TILES, {major: chosen | {kernel: source.Tiles(*tiles)}})

        values = tuple(chosen[kernel]), *TILES[name]
        sweep(name, values, using, call, tflops=products * 2 * shape.tokens**2 * shape.width / 1e12)


def lora_columns(shape: Any, sweep: Sweep) -> None:
    from bench.cases.kernel_problem import random
    from prfl_kernels import lora_linear_triton as source

    x, low = random(1, shape.tokens, shape.width, seed=0), random(shape.tokens, RANK, seed=1)
    mean, rstd = x.float().mean(-1), x.float().var(-1).rsqrt()
    scale, shift = (random(1, 1, shape.width, seed=seed).float() for seed in (2, 3))
    moved = 2 * (x.numel() + low.numel()) / 1e9
    normed: tuple[Any, ...] = mean, rstd, scale, shift
    for kind, parts in (("Normed", normed), ("Gelu", (None,) * 4)):
        call = partial(partial(source.grad_a, low, x, *parts), kind=kind, seed=None, dropout=0.0)
        sweep(f"grad_a-{kind}-columns", COLUMNS, partial(patch.object, source, "COLUMNS"), call, gb_per_s=moved)


def tokens_a_program(shape: Any, sweep: Sweep) -> None:
    import torch

    from bench.cases.kernel_problem import random
    from prfl_kernels import gated_residual_norm_triton as gated
    from prfl_kernels import qk_norm_rope_triton as norm

    q, k, x, grad = (random(1, shape.tokens, shape.width, seed=seed) for seed in range(4))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    rstd = torch.empty(2, 1, shape.tokens, device=q.device)
    weight = torch.ones(shape.width, device=q.device, dtype=q.dtype)
    cos, sin = torch.ones(2, shape.tokens, shape.width // shape.heads // 2, device=q.device)
    arguments = q, k, weight, weight, cos, sin, q_out, k_out, rstd, shape.heads
    elements = partial(patch.object, norm, "ELEMENTS")
    moved = 2 * x.numel() / 1e9  # of one tensor
    sweep("qk_norm_rope-elements", ELEMENTS, elements, lambda: norm.forward(*arguments, 1e-6), gb_per_s=4 * moved)

    def back() -> None:
        norm.backward(q, k, q_out, k_out, rstd, weight, weight, cos, sin, x, grad, shape.heads, True)

    sweep("qk_norm_rope-backward-elements", ELEMENTS, elements, back, gb_per_s=6 * moved)
    gate, scale, shift = (random(1, 1, shape.width, seed=seed).float() for seed in (4, 5, 6))
    total, _, mean, inverse = gated.forward(q, k, gate, (scale, shift), 1e-6)
    assert mean is not None and inverse is not None
    call = partial(gated.backward, q, k, total, (mean, inverse), None, gate, scale, (None,) * 3)
    rows = partial(patch.object, gated, "ROWS")
    sweep("gated_residual_norm-backward-rows", ROWS, rows, call, gb_per_s=5 * moved)
