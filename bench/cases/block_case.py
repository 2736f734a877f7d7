"""A Wan block with adapters on its linear layers, and a whole gradient step of them: diffusers and peft as they come,
compiled, with our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.kernel_problem import (  # fmt: skip
    CEILING,
    COMPILED,
    DTYPE,
    EAGER,
    OURS,
    OURS_COMPILED,
    PEFT,
    TEXT,
    device,
    names,
    random,
    rotary,
    shape_of,
    share,
    silent,
)
from bench.harness.problem import Outputs, Problem, Work, differentiated
from prfl_kernels.builds import Shape


class Network(nn.Module):
    """What ``use_kernels`` looks for in a transformer."""

    def __init__(self, shape: Shape) -> None:
        from diffusers.models.transformers.transformer_wan import WanTransformerBlock

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = WanTransformerBlock(shape.width, shape.hidden, shape.heads, cross_attn_norm=True)
        self.blocks = nn.ModuleList([block])


BLOCKS = {("tiny", 128): 4, ("small", 768): 12, ("wan-1.3b", 1536): 30, ("wan-14b", 5120): 40}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


def network(shape: Shape, rank: int, adapters: torch.dtype, weights: torch.dtype = DTYPE) -> Network:
    """Make one block, its frozen weights rounded to DTYPE and kept in ``weights``, adapters in ``adapters``."""
    from peft import LoraConfig, inject_adapter_in_model

    model = Network(shape).requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), model)
    model = model.to(device())
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            adapter = ".lora_" in name
            if adapter:
                scale = parameter.shape[1] ** -0.5 if ".lora_A." in name else 0.1
                parameter.copy_(random(*parameter.shape, seed=100 + i, scale=scale))
            # The table stays in float32, as diffusers keeps it.
            dtype = torch.float32 if name.endswith("scale_shift_table") else weights
            parameter.data = parameter.data.to(DTYPE).to(adapters if adapter else dtype)
    return model


def gradient_step(world: str, tokens: int, mode: str, rank: int) -> Problem:
    """Run all blocks of the transformer, each checkpointed as prfl does it: a gradient step but for its two ends.

    The blocks are one block again and again: as much work and as many activations, one block's weights.
    """
    return wan_block(world, tokens, mode, rank, blocks=BLOCKS[world, shape_of(world, tokens).width])


def wan_block(world: str, tokens: int, mode: str, rank: int, blocks: int = 1) -> Problem:
    """Run one block of the transformer with adapters on every linear layer; kernels swapped in or not."""
    from prfl.backbone.checkpointing import run_block
    from prfl.backbone.wan.kernels import use_kernels
    from prfl_kernels.qk_norm_rope import pack_tables

    shape = shape_of(world, tokens)
    leaves = {"hidden": random(1, tokens, shape.width, seed=0).requires_grad_()}
    upstream = {"hidden": random(1, tokens, shape.width, seed=1)}
    text = random(1, TEXT if world.startswith("wan") else 16, shape.width, seed=2)
    time = random(1, 6, shape.width, seed=3, scale=0.3, dtype=torch.float32)
    tables = rotary(tokens, shape.width // shape.heads)

    def work(
        adapters: torch.dtype, which: Sequence[str] | None = None, compiled: bool = False, weights: torch.dtype = DTYPE
    ) -> Work:
        model = network(shape, rank, adapters, weights)
        if which is not None:
            use_kernels(model, which)
        block = model.blocks[0]
        trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
        run_once = torch.compile(block, dynamic=False) if compiled else block

        def call(hidden: Tensor, *inputs: Any) -> Tensor:
            for _ in range(blocks):
                hidden = run_once(hidden, *inputs) if blocks == 1 else run_block(run_once, hidden, *inputs, mode="full")
            return hidden

        hidden = leaves["hidden"] if weights == DTYPE else leaves["hidden"].detach().to(weights).requires_grad_()
        inputs = (text.to(weights), time, tables if which is None else pack_tables(*tables))
        return differentiated(
            lambda: {"hidden": call(hidden, *inputs)}, {"hidden": hidden, **trained},
            {"hidden": upstream["hidden"].to(weights)}, mode, [*model.parameters(), *tables, time, inputs[0]],
        )  # fmt: skip

    def exact() -> Outputs:
        wide = work(torch.float64, weights=torch.float64)
        result = wide.run(wide.before())
        assert result is not None
        return result

    def ceiling() -> Work:
        """Make a work of the layers' products and both attentions, by themselves."""
        block = network(shape, rank, DTYPE).blocks[0]
        linears = {name: layer.weight for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
        weights = [weight for name, weight in linears.items() if name.endswith("base_layer")]
        return silent(block_products(shape, weights, text.shape[1], mode))

    from prfl.backbone.wan.kernels import SWAPPED

    works = {
        EAGER: lambda: work(DTYPE), COMPILED: lambda: work(DTYPE, compiled=True), PEFT: lambda: work(torch.float32),
        OURS: lambda: work(torch.float32, SWAPPED), OURS_COMPILED: lambda: work(torch.float32, SWAPPED, True),
    }  # fmt: skip
    if blocks == 1:
        works[CEILING] = ceiling

    # Operations that the work cannot do without: the layers' products (q, k, v and out of both attentions, up
    # and down), and two products of tokens x keys in each attention.
    square, wide, both = shape.width**2, shape.width * shape.hidden, tokens + text.shape[1]
    linear = 2.0 * (tokens * (6 * square + 2 * wide) + text.shape[1] * 2 * square)
    attention = 4.0 * tokens * both * shape.width
    # Frozen weights: the products' backward is the input's gradient alone; attention's is two and a half times.
    flops = blocks * share(mode, linear + attention, linear + 2.5 * attention)

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
        results = {str(i): nn.functional.linear(x, weight) for i, (x, weight) in enumerate(pairs)}
        results["self"] = nn.functional.scaled_dot_product_attention(q, k, v)
        results["text"] = nn.functional.scaled_dot_product_attention(q, text_k, text_v)
        return results

    with torch.no_grad():
        upstream = {name: torch.ones_like(value) for name, value in call().items()}
    return differentiated(call, leaves, upstream, mode, weights)
