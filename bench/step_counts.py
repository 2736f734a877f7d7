"""Where the work of a PRFL step lies at Wan's real shapes: arithmetic, memory traffic and launches, by counting.

    python bench/step_counts.py [--out bench/results/step.json]

A rollout's network call and a gradient's (forward, checkpointed blocks again, backward) run on ``meta``; every
operation that is not a view counts its operands and results as traffic and as one launch, and matrix products their
arithmetic.  So it is what eager torch asks of a GPU, before caches; nothing is timed.  Without and with the kernels.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import studies
from bench.harness import study_tables
from prfl.config import load_config
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.parts import Shapes
from prfl.estimate.phases import fewer_blocks
from prfl.factory.backbone import POLICY, build_architecture

CASES = {
    "1.3B 480p": ("configs/wan2.1-1.3b/prfl.yaml", 480, 832),
    "14B 480p": ("configs/wan2.1-14b/prfl.yaml", 480, 832),
    "14B 720p": ("configs/wan2.1-14b/prfl.yaml", 720, 1280),
}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
# Matrix products of tokens x keys x channels in each: a backward pass rebuilds the weights first.
ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
    "attention": 2,
    "attention_query_gradient": 3,
    "attention_key_gradient": 4,
}
FORWARDS = ("_scaled_dot_product_flash_attention_for_cpu", "attention")
# Of an H200 in a second: what public measurements reach for each kind (matrix products, cuDNN's attention, copies).
PRODUCT, REST = "matrix products", "norms, gates, rotations, copies"
FORWARD, BACKWARD = "attention, forward", "attention, backward"
GFLOPS = {PRODUCT: 680e3, FORWARD: 600e3, BACKWARD: 516e3, REST: 680e3}
GBS = 4200.0


class Work(TorchDispatchMode):
    """Context manager that counts work.  amounts: {(kind, unit): amount}, in GFLOP, GB and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.amounts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if func.is_view or not tensors or name in ("detach", "empty", "empty_like", "new_empty"):
            return result
        kind, flops = REST, 0
        if name in PRODUCTS:
            factors = [leaf for leaf in args if isinstance(leaf, Tensor)][-2:]
            kind, flops = PRODUCT, 2 * factors[0].numel() * factors[1].shape[-1]
        elif name in ATTENTION:
            query, key = (
                args[:2] if name in FORWARDS else args[1:3]
            )  # a backward pass begins with the output's gradient
            tokens = -2 if name.startswith("_scaled") else 1
            product = 2 * query.numel() * key.shape[tokens]
            kind, flops = FORWARD if name in FORWARDS else BACKWARD, ATTENTION[name] * product
        self.amounts[kind, "GFLOP"] += flops / 1e9
        self.amounts[kind, "GB"] += sum(leaf.numel() * leaf.itemsize for leaf in tensors) / 1e9
        self.amounts[kind, "launches"] += 1
        return result


def counted(config_file: str, height: int, width: int, kernels: bool, gradient: bool) -> dict[str, dict[str, float]]:
    size = [f"data.height={height}", f"data.width={width}", "data.frames=81", "backbone.checkpointing=full"]
    chosen = f"backbone.kernels={'triton' if kernels else 'torch'}"
    config = load_config(config_file, ["backbone.device=cuda", chosen, *size])
    model = build_architecture(config)
    shapes, counts = Shapes(model, config), []
    for parameter in model.parameters(POLICY).values():
        parameter.grad = torch.zeros_like(parameter)

    # Two sizes, continued in a straight line to all of the blocks.
    facts = model.facts
    total, group = facts.num_blocks, model.running.blocks_together(facts.kernels, facts.lean_group)
    for blocks in (2 * group, 3 * group):  # and continued in a straight line to all of them
        with fused_on_meta("cuda"), fewer_blocks(model, blocks), torch.set_grad_enabled(gradient), Work() as work:
            with model.adapter(POLICY):
                output = model.velocity(shapes.latents(1), torch.tensor(0.5), shapes.condition(1))
                if gradient:
                    output.backward(torch.zeros_like(output))
        counts.append(work.amounts)

    two, three = counts
    amounts_of: dict[str, dict[str, float]] = {}
    for kind, unit in sorted(three):
        further = (total - 3 * group) // group
        amount = three[kind, unit] + further * (three[kind, unit] - two[kind, unit])
        amounts_of.setdefault(kind, {})[unit] = amount
    for kind, of_kind in amounts_of.items():
        amounts_of[kind]["ms at the roofline"] = 1e3 * max(of_kind["GFLOP"] / GFLOPS[kind], of_kind["GB"] / GBS)
    return amounts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"))
    calls = {}
    for (name, case), gradient, kernels in product(CASES.items(), (False, True), (False, True)):
        call = f"{name}, {'gradient' if gradient else 'rollout'}, {'kernels' if kernels else 'torch'}"
        calls[call] = counted(*case, kernels=kernels, gradient=gradient)

    how = "counted on meta tensors, nothing timed; the roofline is each kind's larger one of arithmetic and traffic"
    result = {"how": how, "assumed of the GPU, a second": {"GFLOP": GFLOPS, "GB": GBS}, "calls": calls}
    out = parser.parse_args().out
    studies.write(out, result, weights=studies.COUNTED)
    print(study_tables.of_files("work", out))


if __name__ == "__main__":
    main()
