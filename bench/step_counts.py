"""Where the work of a PRFL step lies at Wan's real shapes: arithmetic, memory traffic and launches, by counting.

    python bench/step_counts.py [--out bench/results/step.json]

A rollout's network call and a gradient's (forward, checkpointed blocks again, backward) run on ``meta``; every
operation that is not a view counts its operands and results as traffic and as one launch, and matrix products their
arithmetic.  So it is what eager torch asks of a GPU, before caches; nothing is timed.  Without and with the kernels.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch

from bench import studies
from bench.harness import study_tables
from prfl.config import load_config
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.parts import Shapes
from prfl.estimate.phases import fewer_blocks
from prfl.estimate.work import BACKWARD, FORWARD, H200_GBS, H200_GFLOPS, PRODUCT, REST, Counted
from prfl.factory.backbone import POLICY, build_architecture

CASES = {
    "1.3B 480p": ("configs/wan2.1-1.3b/prfl.yaml", 480, 832),
    "14B 480p": ("configs/wan2.1-14b/prfl.yaml", 480, 832),
    "14B 720p": ("configs/wan2.1-14b/prfl.yaml", 720, 1280),
}
KINDS = (PRODUCT, REST, FORWARD, BACKWARD)
GFLOPS, GBS = {kind: H200_GFLOPS[kind] for kind in KINDS}, H200_GBS


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
        with fused_on_meta("cuda"), fewer_blocks(model, blocks), torch.set_grad_enabled(gradient), Counted() as work:
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
