"""The kernels' cases: every operation of prfl_kernels beside torch, peft, Liger and the least that a GPU must do.

To add an operation: a function that makes its ``Problem`` from tensors, mostly by ``operation``, and a line in
``cases``.  The forms that all providers share (inputs, gradients, names of outputs) are given once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.block_case import gradient_step, wan_block
from bench.cases.kernel_problem import (  # fmt: skip
    CEILING,
    COMPILED,
    DTYPE,
    EAGER,
    LIGER,
    OURS,
    OURS_COMPILED,
    PEFT,
    PEFT_HALF,
    REBUILT,
    WORLDS,
    Call,
    copy,
    device,
    operation,
    products,
    random,
    rotary,
    shape_of,
    share,
)
from bench.harness.problem import MODES, Case, Needs, Outputs, Problem, Work, differentiated
from prfl_kernels import reference
from prfl_kernels.attention import attention
from prfl_kernels.builds import RANKS, Shape
from prfl_kernels.gated_residual_norm import gated_residual_norm
from prfl_kernels.lora_linear import Normed, Projection, lora_linears
from prfl_kernels.qk_norm_rope import pack_tables, qk_norm_rope


def cases(world: str) -> list[Case]:
    ranks = RANKS if world.startswith("wan") else (16,)
    all_cases = []
    # Each part of a pass is compiled anew, and two cores have five minutes for all of tiny.
    modes = [mode for mode in MODES if (world, mode) != ("tiny", "backward")]
    for shape, mode in product(WORLDS[world], modes):
        settings = {"world": world, "tokens": shape.tokens, "mode": mode}
        make = partial(_case, world, shape, mode)
        lora = (EAGER, COMPILED, PEFT, PEFT_HALF, OURS, REBUILT, CEILING)
        block = (EAGER, COMPILED, PEFT, OURS, OURS_COMPILED, CEILING)
        all_cases += [make("lora_linear", lora_linear, {**settings, "rank": rank}, lora) for rank in ranks]
        all_cases.append(make("qk_norm_rope", qk_norm, settings, (EAGER, COMPILED, LIGER, OURS, CEILING)))
        all_cases.append(make("gated_residual_norm", gated_norm, settings, (EAGER, COMPILED, LIGER, OURS, CEILING)))
        all_cases.append(make("attention", self_attention, settings, (EAGER, OURS)))
        all_cases += [make("wan_block", wan_block, {**settings, "rank": rank}, block) for rank in ranks]
        step = EAGER, PEFT, OURS
        all_cases += [make("gradient_step", gradient_step, {**settings, "rank": rank}, step) for rank in ranks]
    return all_cases


def _case(world: str, shape: Shape, mode: str, name: str, build: Any, settings: dict, providers: tuple) -> Case:
    unit = shape.tokens * shape.width * 2 / 2**30  # GiB of one hidden state
    needs = Needs(gpu=world.startswith("wan"), gib=float(round(2 + 90 * unit)) if world.startswith("wan") else 0.0)
    # The peak of a whole pass; that of a half is less telling and takes a process, too.
    return Case(name, build, settings, providers, needs, memory=mode == "both")


def lora_linear(world: str, tokens: int, mode: str, rank: int) -> Problem:
    """Query, key and value of one input, each with its adapter."""
    shape = shape_of(world, tokens)
    width, each, scale = shape.width, "qkv", 1.0
    source = random(1, tokens, width, seed=0)
    modulation = [random(1, 1, width, seed=i, scale=0.3, dtype=torch.float32) for i in (1, 2)]
    mean, rstd = source.float().mean(-1), (source.float().var(-1, correction=0) + 1e-6).rsqrt()
    normed = Normed(source, mean, rstd, *modulation)
    weights = [random(width, width, seed=10 + i, scale=width**-0.5) for i in range(3)]
    biases = [random(width, seed=20 + i, scale=0.1) for i in range(3)]
    leaves = {"x": reference.modulated_layer_norm(source, *modulation)}
    for i, name in enumerate(each):  # float32 masters whose values bfloat16 has, so that all providers have the same
        leaves[f"A {name}"] = random(rank, width, seed=30 + i, scale=width**-0.5, dtype=torch.float32)
        leaves[f"B {name}"] = random(width, rank, seed=40 + i, scale=0.1, dtype=torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    upstream = {name: random(1, tokens, width, seed=50 + i) for i, name in enumerate(each)}

    def projections(leaves: Outputs) -> list[Projection]:
        return [
            Projection(weight, bias, leaves[f"A {name}"], leaves[f"B {name}"], scale)
            for name, weight, bias in zip(each, weights, biases, strict=True)
        ]

    def plain(leaves: Outputs) -> Outputs:
        x, wide = leaves["x"], [(weight.to(leaves["x"]), bias.to(leaves["x"])) for weight, bias in zip(
            weights, biases, strict=True)]  # fmt: skip
        adapters = [(leaves[f"A {name}"], leaves[f"B {name}"]) for name in each]
        projected = [reference.lora_linear(x, *w, *a, scale) for w, a in zip(wide, adapters, strict=True)]
        return dict(zip(each, projected, strict=True))

    def ours(source: Normed | None, leaves: Outputs) -> Outputs:
        return dict(zip(each, lora_linears(leaves["x"], projections(leaves), source=source), strict=True))

    def peft(dtype: torch.dtype) -> Work:
        layers, peft_leaves = peft_layers(weights, biases, leaves, each, rank, scale, dtype)
        return differentiated(
            lambda: {name: layer(leaves["x"]) for name, layer in zip(each, layers, strict=True)},
            peft_leaves, upstream, mode, constant,
        )  # fmt: skip

    constant = [*weights, *biases, *(leaf for name, leaf in leaves.items() if name != "x")]
    products_ = 2.0 * tokens * width * width * 3
    low = 2.0 * tokens * rank * width * 3
    problem = operation(
        {OURS: lambda: partial(ours, None), REBUILT: lambda: partial(ours, normed)},
        plain, leaves, upstream, mode, constant,
        flops=share(mode, products_ + 2 * low, products_ + 4 * low),
        works={
            PEFT: partial(peft, torch.float32), PEFT_HALF: partial(peft, DTYPE),
            CEILING: lambda: products(leaves["x"], weights, mode),
        },
    )  # fmt: skip
    # What the input is rebuilt from is kept by the norm before; it is no cost of the layer.
    rebuilt_work = problem.works[REBUILT]

    def rebuilt() -> Work:
        work = rebuilt_work()
        return work._replace(constant=[*work.constant, *normed])

    return replace(problem, works={**problem.works, REBUILT: rebuilt})


def peft_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], leaves: Outputs, each: str, rank: int, scale: float,
    dtype: torch.dtype,
) -> tuple[list[nn.Module], dict[str, Tensor]]:  # fmt: skip
    """Make peft's layers with these values, and leaves of the same names."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    layers: list[nn.Module] = []
    peft_leaves = {"x": leaves["x"]}
    for name, weight, bias in zip(each, weights, biases, strict=True):
        base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        base.weight, base.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        layer = Linear(base, "policy", LoraConfig(r=rank, lora_alpha=round(rank * scale)), r=rank, lora_alpha=rank)
        for letter, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            value = leaves[f"{letter} {name}"].detach().to(dtype, copy=True)
            peft_leaves[f"{letter} {name}"] = part["policy"].weight = nn.Parameter(value)
        layers.append(layer)
    return layers, peft_leaves


def qk_norm(world: str, tokens: int, mode: str) -> Problem:
    shape = shape_of(world, tokens)
    size = (1, tokens, shape.width)
    leaves = {name: random(*size, seed=i).requires_grad_() for i, name in enumerate("qk")}
    upstream = {name: random(*size, seed=10 + i) for i, name in enumerate("qk")}
    weights = {name: random(shape.width, seed=20 + i, scale=0.1) + 1 for i, name in enumerate("qk")}
    cos, sin = rotary(tokens, shape.width // shape.heads)
    packed = pack_tables(cos, sin)  # once for all blocks

    def plain(leaves: Outputs) -> Outputs:
        return {name: reference.qk_norm_rope(x, weights[name], cos, sin, shape.heads) for name, x in leaves.items()}

    def ours(leaves: Outputs) -> Outputs:
        rotated = qk_norm_rope(
            leaves["q"], leaves["k"], weights["q"], weights["k"], *packed, shape.heads, from_output=True
        )
        return {name: value for name, value in zip("qk", rotated, strict=True) if value is not None}

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_rms_norm

        def call(leaves: Outputs) -> Outputs:
            normed = {name: liger_rms_norm(x, weights[name], 1e-6, in_place=False) for name, x in leaves.items()}
            return {name: reference.rotate(x, cos, sin, shape.heads) for name, x in normed.items()}

        return call

    unit = 2.0 * tokens * shape.width
    moved = share(mode, 4 * unit, 6 * unit)  # q, k in and out; their gradients in and out, and the outputs once more
    return operation(
        {OURS: lambda: ours, LIGER: liger}, plain, leaves, upstream, mode, [*weights.values(), cos, sin, *packed],
        moved=moved, works={CEILING: lambda: copy(moved)},
    )  # fmt: skip


def gated_norm(world: str, tokens: int, mode: str) -> Problem:
    """Join two branches in the middle of a block: gated sum, LayerNorm, modulation, all of one time embedding."""
    shape = shape_of(world, tokens)
    size = (1, tokens, shape.width)
    leaves = {name: random(*size, seed=i).requires_grad_() for i, name in enumerate("xy")}
    upstream = {name: random(*size, seed=10 + i) for i, name in enumerate(("total", "normed"))}
    modulation = [random(1, 1, shape.width, seed=20 + i, scale=0.3, dtype=torch.float32) for i in range(3)]

    def plain(leaves: Outputs) -> Outputs:
        results = reference.gated_residual_norm(leaves["x"], leaves["y"], *modulation)
        return {"total": results[0], "normed": results[1]}

    def ours(leaves: Outputs) -> Outputs:
        joined = gated_residual_norm(leaves["x"], leaves["y"], *modulation)
        return {"total": joined.x, "normed": joined.normed}

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_layer_norm

        gate, scale, shift = modulation
        ones, zeros = torch.ones(shape.width, device=device()), torch.zeros(shape.width, device=device())

        def call(leaves: Outputs) -> Outputs:
            total = (leaves["x"].float() + gate * leaves["y"].float()).to(DTYPE)
            normed = liger_layer_norm(total.float(), ones, zeros, 1e-6)
            return {"total": total, "normed": (normed * (1 + scale) + shift).to(DTYPE)}

        return call

    unit = 2.0 * tokens * shape.width
    moved = share(mode, 4 * unit, 5 * unit)  # x, y, sum, normed; two gradients and the sum in, two gradients out
    return operation(
        {OURS: lambda: ours, LIGER: liger}, plain, leaves, upstream, mode, modulation,
        moved=moved, works={CEILING: lambda: copy(moved)},
    )  # fmt: skip


def self_attention(world: str, tokens: int, mode: str) -> Problem:
    """Ours beside what torch picks by itself, in the layout that diffusers hands over."""
    shape = shape_of(world, tokens)
    size = (1, tokens, shape.heads, shape.width // shape.heads)
    leaves = {name: random(*size, seed=i).requires_grad_() for i, name in enumerate("qkv")}
    upstream = {"out": random(*size, seed=10)}

    def plain(leaves: Outputs) -> Outputs:
        heads_first = [leaf.transpose(1, 2) for leaf in leaves.values()]
        return {"out": torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)}

    def ours(leaves: Outputs) -> Outputs:
        return {"out": attention(*leaves.values())}

    product = (
        2.0 * tokens * tokens * shape.width
    )  # two of them forward; backward five, the weights once more among them
    flops = share(mode, 2 * product, 5 * product)
    problem = operation({OURS: lambda: ours}, plain, leaves, upstream, mode, flops=flops)
    return problem if tokens <= 4096 else replace(problem, exact=None)  # a float64 matrix of tokens x tokens
