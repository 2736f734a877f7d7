"""The kernels' cases: every operation of prfl_kernels beside torch, peft, Liger and the least that a GPU must do.

To add an operation: a function that makes its ``Problem`` from tensors, mostly by ``operation``, and a line in
``cases``.  The forms that all providers share (inputs, gradients, names of outputs) are given once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from prfl.benchmark.problem import MODES, Case, Needs, Outputs, Problem, Work, differentiated
from prfl_kernels import reference
from prfl_kernels.builds import RANKS, SHAPES, Shape
from prfl_kernels.dispatch import interpreting
from prfl_kernels.gated_residual_norm import gated_residual_norm
from prfl_kernels.lora_linear import Normed, Projection, lora_linears
from prfl_kernels.qk_norm_rope import qk_norm_rope

DTYPE = torch.bfloat16
OURS, EAGER, COMPILED, LIGER, CEILING = "ours", "eager", "torch.compile", "liger", "ceiling"
REBUILT, PEFT, PEFT_HALF, OURS_COMPILED = "ours, input rebuilt", "peft", "peft bf16", "ours, compiled"
WORLDS: Mapping[str, tuple[Shape, ...]] = {
    "tiny": (Shape("tiny", 80, 128, 4, 512),),  # the shapes world's
    "small": (Shape("small", 2048, 768, 12, 3072),),  # 12 blocks are about 100 M parameters
    "wan-1.3b": SHAPES[:1],
    "wan-14b": SHAPES[1:],
}
TEXT = 512  # Wan's text tokens
GRID = {80: (5, 4, 4), 2048: (8, 16, 16), 32760: (21, 30, 52), 75600: (21, 45, 80)}  # frames, height, width of tokens


def cases(world: str) -> list[Case]:
    ranks = RANKS if world.startswith("wan") else (16,)
    found = []
    for shape, mode in product(WORLDS[world], MODES):
        own = {"world": world, "tokens": shape.tokens, "mode": mode}
        make = partial(_case, world, shape, mode)
        lora = (EAGER, COMPILED, PEFT, PEFT_HALF, OURS, REBUILT, CEILING)
        block = (EAGER, COMPILED, PEFT, OURS, OURS_COMPILED, CEILING)
        found += [make("lora_linear", lora_linear, {**own, "rank": rank}, lora) for rank in ranks]
        found.append(make("qk_norm_rope", qk_norm, own, (EAGER, COMPILED, LIGER, OURS, CEILING)))
        found.append(make("gated_residual_norm", gated_norm, own, (EAGER, COMPILED, LIGER, OURS, CEILING)))
        found += [make("wan_block", wan_block, {**own, "rank": rank}, block) for rank in ranks]
    return found


def _case(world: str, shape: Shape, mode: str, name: str, build: Any, settings: dict, providers: tuple) -> Case:
    unit = shape.tokens * shape.width * 2 / 2**30  # GiB of one hidden state
    needs = Needs(gpu=world.startswith("wan"), gib=float(round(2 + 90 * unit)) if world.startswith("wan") else 0.0)
    # The peak of a whole pass; that of a half is less telling and takes a process, too.
    return Case(name, build, settings, providers, needs, memory=mode == "both")


# ------------------------------------------------------------------------------------------------- what problems share


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def shape_of(world: str, tokens: int) -> Shape:
    return next(shape for shape in WORLDS[world] if shape.tokens == tokens)


def random(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normal numbers, drawn where they are used, and rounded to DTYPE whatever ``dtype`` is."""
    where = device()
    drawn = torch.randn(*shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    return drawn.mul_(scale).to(DTYPE).to(dtype)


def names() -> dict[str, str]:
    """Without a GPU our operations run as torch, and the results say so."""
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
    """A problem whose providers are functions of the same leaves.

    calls: what makes each provider's function, when it is wanted.  plain: the formula in torch, which is the provider
    "eager", compiled "torch.compile", and in float64 the exact result.
    """

    def work(make: Callable[[], Call]) -> Work:
        call = make()
        return differentiated(lambda: call(leaves), leaves, upstream, mode, constant)

    def exact() -> Outputs:
        wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        grads = {name: grad.double() for name, grad in upstream.items()}
        found = differentiated(lambda: plain(wide), wide, grads, mode)
        result = found.run(found.before())
        assert result is not None
        return {name: value.detach() for name, value in result.items()}

    all_calls = {EAGER: lambda: plain, COMPILED: lambda: torch.compile(plain, dynamic=False), **calls}
    works: dict[str, Callable[[], Work]] = {name: partial(work, make) for name, make in all_calls.items()}
    works |= more.pop("works", {})
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    return Problem(works, EAGER, DTYPE, exact, shapes=shapes, names=names(), **more)


def copy(moved: float) -> Work:
    """The ceiling of what memory bounds: a plain copy of as many bytes, read and written."""
    source = torch.empty(int(moved / 2), dtype=torch.int8, device=device())
    target = torch.empty_like(source)

    def run(_: Any) -> None:
        target.copy_(source)

    return Work(run)


def products(x: Tensor, weights: Sequence[Tensor], mode: str) -> Work:
    """The ceiling of what products bound: those of frozen layers alone."""
    x = x.detach().requires_grad_()
    upstream = {str(i): random(*x.shape[:-1], len(weight), seed=50 + i) for i, weight in enumerate(weights)}

    def call() -> Outputs:
        return {str(i): nn.functional.linear(x, weight) for i, weight in enumerate(weights)}

    return silent(differentiated(call, {"x": x}, upstream, mode, weights))


def silent(work: Work) -> Work:
    """Timed like any other, and compared with none."""

    def run(given: Any) -> None:
        work.run(given)

    return work._replace(run=run)


def share(mode: str, forward: float, backward: float) -> float:
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


# ------------------------------------------------------------------------------------------------------- the operations


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
        found = [reference.lora_linear(x, *w, *a, scale) for w, a in zip(wide, adapters, strict=True)]
        return dict(zip(each, found, strict=True))

    def ours(source: Normed | None, leaves: Outputs) -> Outputs:
        return dict(zip(each, lora_linears(leaves["x"], projections(leaves), source=source), strict=True))

    def peft(dtype: torch.dtype) -> Work:
        layers, own = peft_layers(weights, biases, leaves, each, rank, scale, dtype)
        return differentiated(
            lambda: {name: layer(leaves["x"]) for name, layer in zip(each, layers, strict=True)},
            own, upstream, mode, constant,
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
    kept = problem.works[REBUILT]
    works = {**problem.works, REBUILT: lambda: (own := kept())._replace(constant=[*own.constant, *normed])}
    return replace(problem, works=works)


def peft_layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor], leaves: Outputs, each: str, rank: int, scale: float,
    dtype: torch.dtype,
) -> tuple[list[nn.Module], dict[str, Tensor]]:  # fmt: skip
    """peft's layers with these values, and leaves of the same names."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    layers: list[nn.Module] = []
    own = {"x": leaves["x"]}
    for name, weight, bias in zip(each, weights, biases, strict=True):
        base = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        base.weight, base.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        layer = Linear(base, "policy", LoraConfig(r=rank, lora_alpha=round(rank * scale)), r=rank, lora_alpha=rank)
        for letter, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            value = leaves[f"{letter} {name}"].detach().to(dtype, copy=True)
            own[f"{letter} {name}"] = part["policy"].weight = nn.Parameter(value)
        layers.append(layer)
    return layers, own


def rotary(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """cos and sin (1, T, 1, C), each value twice, of Wan's form; angles of a line of tokens do for a benchmark."""
    angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, channels, 2) / channels))
    table = angles.repeat_interleave(2, 1)[None, :, None].to(device(), torch.float32)
    return table.cos(), table.sin()


def qk_norm(world: str, tokens: int, mode: str) -> Problem:
    shape = shape_of(world, tokens)
    size = (1, tokens, shape.width)
    leaves = {name: random(*size, seed=i).requires_grad_() for i, name in enumerate("qk")}
    upstream = {name: random(*size, seed=10 + i) for i, name in enumerate("qk")}
    weights = {name: random(shape.width, seed=20 + i, scale=0.1) + 1 for i, name in enumerate("qk")}
    cos, sin = rotary(tokens, shape.width // shape.heads)

    def plain(leaves: Outputs) -> Outputs:
        return {name: reference.qk_norm_rope(x, weights[name], cos, sin, shape.heads) for name, x in leaves.items()}

    def ours(leaves: Outputs) -> Outputs:
        found = qk_norm_rope(
            leaves["q"], leaves["k"], weights["q"], weights["k"], cos, sin, shape.heads, from_output=True
        )
        return {name: value for name, value in zip("qk", found, strict=True) if value is not None}

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_rms_norm

        def call(leaves: Outputs) -> Outputs:
            found = {name: liger_rms_norm(x, weights[name], 1e-6, in_place=False) for name, x in leaves.items()}
            return {name: reference.rotate(x, cos, sin, shape.heads) for name, x in found.items()}

        return call

    unit = 2.0 * tokens * shape.width
    moved = share(mode, 4 * unit, 6 * unit)  # q, k in and out; their gradients in and out, and the outputs once more
    return operation(
        {OURS: lambda: ours, LIGER: liger}, plain, leaves, upstream, mode, [*weights.values(), cos, sin],
        moved=moved, works={CEILING: lambda: copy(moved)},
    )  # fmt: skip


def gated_norm(world: str, tokens: int, mode: str) -> Problem:
    """The join in the middle of a block: gated sum, LayerNorm, modulation, all of one time embedding."""
    shape = shape_of(world, tokens)
    size = (1, tokens, shape.width)
    leaves = {name: random(*size, seed=i).requires_grad_() for i, name in enumerate("xy")}
    upstream = {name: random(*size, seed=10 + i) for i, name in enumerate(("total", "normed"))}
    modulation = [random(1, 1, shape.width, seed=20 + i, scale=0.3, dtype=torch.float32) for i in range(3)]

    def plain(leaves: Outputs) -> Outputs:
        found = reference.gated_residual_norm(leaves["x"], leaves["y"], *modulation)
        return {"total": found[0], "normed": found[1]}

    def ours(leaves: Outputs) -> Outputs:
        found = gated_residual_norm(leaves["x"], leaves["y"], *modulation)
        return {"total": found.x, "normed": found.normed}

    def liger() -> Call:
        from liger_kernel.transformers.functional import liger_layer_norm

        gate, scale, shift = modulation
        one, zero = torch.ones(shape.width, device=device()), torch.zeros(shape.width, device=device())

        def call(leaves: Outputs) -> Outputs:
            total = (leaves["x"].float() + gate * leaves["y"].float()).to(DTYPE)
            normed = liger_layer_norm(total.float(), one, zero, 1e-6)
            return {"total": total, "normed": (normed * (1 + scale) + shift).to(DTYPE)}

        return call

    unit = 2.0 * tokens * shape.width
    moved = share(mode, 4 * unit, 5 * unit)  # x, y, sum, normed; two gradients and the sum in, two gradients out
    return operation(
        {OURS: lambda: ours, LIGER: liger}, plain, leaves, upstream, mode, modulation,
        moved=moved, works={CEILING: lambda: copy(moved)},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- a whole block


class Network(nn.Module):
    """What ``use_kernels`` looks for in a transformer."""

    def __init__(self, shape: Shape) -> None:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = WanTransformerBlock(shape.width, shape.hidden, shape.heads, cross_attn_norm=True)
        self.blocks = nn.ModuleList([block])


TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def network(shape: Shape, rank: int, adapters: torch.dtype, weights: torch.dtype = DTYPE) -> Network:
    """One block, its frozen weights rounded to DTYPE and kept in ``weights``, adapters in ``adapters``."""
    from peft import LoraConfig, inject_adapter_in_model

    made = Network(shape).requires_grad_(False)
    made = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), made)
    made = made.to(device())
    with torch.no_grad():
        for i, (name, parameter) in enumerate(made.named_parameters()):
            adapter = ".lora_" in name
            if adapter:
                scale = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.1
                parameter.copy_(random(*parameter.shape, seed=100 + i, scale=scale))
            # The table stays in float32, as diffusers keeps it.
            kept = torch.float32 if name.endswith("scale_shift_table") else weights
            parameter.data = parameter.data.to(DTYPE).to(adapters if adapter else kept)
    return made


def wan_block(world: str, tokens: int, mode: str, rank: int) -> Problem:
    """One block of the transformer with adapters on every linear layer; kernels swapped in or not."""
    from prfl.backbone.kernels import use_kernels

    shape = shape_of(world, tokens)
    leaves = {"hidden": random(1, tokens, shape.width, seed=0).requires_grad_()}
    upstream = {"hidden": random(1, tokens, shape.width, seed=1)}
    text = random(1, TEXT if world.startswith("wan") else 16, shape.width, seed=2)
    time = random(1, 6, shape.width, seed=3, scale=0.3, dtype=torch.float32)
    tables = rotary(tokens, shape.width // shape.heads)

    def work(
        adapters: torch.dtype, which: Sequence[str] | None = None, compiled: bool = False, weights: torch.dtype = DTYPE
    ) -> Work:
        made = network(shape, rank, adapters, weights)
        if which is not None:
            use_kernels(made, which)
        block = made.blocks[0]
        trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
        call = torch.compile(block, dynamic=False) if compiled else block
        hidden = leaves["hidden"] if weights == DTYPE else leaves["hidden"].detach().to(weights).requires_grad_()
        known = (text.to(weights), time, tables)
        return differentiated(
            lambda: {"hidden": call(hidden, *known)}, {"hidden": hidden, **trained},
            {"hidden": upstream["hidden"].to(weights)}, mode, [*made.parameters(), *tables, time, known[0]],
        )  # fmt: skip

    def exact() -> Outputs:
        found = work(torch.float64, weights=torch.float64)
        result = found.run(found.before())
        assert result is not None
        return result

    def ceiling() -> Work:
        """The layers' products and both attentions, by themselves."""
        block = network(shape, rank, DTYPE).blocks[0]
        linears = {name: layer.weight for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        weights = [weight for name, weight in linears.items() if name.endswith("base_layer")]
        return silent(block_products(shape, weights, text.shape[1], mode))

    from prfl.backbone.kernels import SWAPPED

    works = {
        EAGER: lambda: work(DTYPE), COMPILED: lambda: work(DTYPE, compiled=True), PEFT: lambda: work(torch.float32),
        OURS: lambda: work(torch.float32, SWAPPED), OURS_COMPILED: lambda: work(torch.float32, SWAPPED, True),
        CEILING: ceiling,
    }  # fmt: skip
    square, wide, both = shape.width**2, shape.width * shape.hidden, tokens + text.shape[1]
    linear = 2.0 * (tokens * (6 * square + 2 * wide) + text.shape[1] * 2 * square)
    attention = 4.0 * tokens * both * shape.width
    # Frozen weights: the products' backward is the input's gradient alone; attention's is two and a half times.
    flops = share(mode, linear + attention, linear + 2.5 * attention)
    affordable = tokens <= 4096  # float64 attention is a matrix of tokens x tokens
    shapes = {"hidden": (1, tokens, shape.width), "text": tuple(text.shape), "feed-forward": (shape.hidden,)}
    return Problem(
        works, EAGER, DTYPE, exact if affordable else None, "float64 (norms in float32)",
        flops=flops, shapes=shapes, names=names(),
    )  # fmt: skip


def block_products(shape: Shape, weights: Sequence[Tensor], text: int, mode: str) -> Work:
    heads, channels = shape.heads, shape.width // shape.heads
    sizes = {(shape.tokens, shape.width), (text, shape.width), (shape.tokens, shape.hidden)}
    inputs = {size: random(1, *size, seed=sum(size)).requires_grad_() for size in sorted(sizes)}
    lengths = [shape.tokens] * 5 + [text] * 2 + [shape.tokens] * 3  # q k v out, q k v out, up, down
    pairs = [(inputs[length, weight.shape[1]], weight) for length, weight in zip(lengths, weights, strict=True)]
    q, k, v, text_k, text_v = (
        random(1, heads, length, channels, seed=i).requires_grad_()
        for i, length in enumerate((*[shape.tokens] * 3, text, text))
    )
    leaves = {**{str(key): value for key, value in inputs.items()}, "q": q, "k": k, "v": v, "k2": text_k, "v2": text_v}

    def call() -> Outputs:
        found = {str(i): nn.functional.linear(x, weight) for i, (x, weight) in enumerate(pairs)}
        found["self"] = nn.functional.scaled_dot_product_attention(q, k, v)
        found["text"] = nn.functional.scaled_dot_product_attention(q, text_k, text_v)
        return found

    with torch.no_grad():
        upstream = {name: torch.ones_like(value) for name, value in call().items()}
    return differentiated(call, leaves, upstream, mode, weights)
