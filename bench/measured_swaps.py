"""How long a swap of Wan 2.2 A14B's experts takes (``backbone.experts.resident: one``): random weights, real shapes.

    python bench/measured_swaps.py [--blocks 40] --out FILE.json

Both networks' frozen blocks lie in pinned host memory, and take turns in one set of buffers on the GPU, as in a run
(prfl/backbone/turns.py).  Seconds are those of a swap until the last byte has come, each of ``RUNS`` times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]  # a machine where prfl is not installed will do

from bench import studies  # noqa: E402
from bench.harness.worlds import default_dtype  # noqa: E402
from prfl.backbone.families import architecture_folder  # noqa: E402
from prfl.backbone.turns import Turns  # noqa: E402

MODEL = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
RUNS = 6


def network(blocks: int, device: torch.device) -> WanTransformer3DModel:
    """Build an expert with random weights in bfloat16, made on the device."""
    config = WanTransformer3DModel.load_config(architecture_folder(MODEL), subfolder="transformer")
    with device, default_dtype(torch.bfloat16):
        return WanTransformer3DModel.from_config({**config, "num_layers": blocks}).requires_grad_(False)


def measured(blocks: int, device: torch.device) -> dict:
    began = time.monotonic()
    experts = {name: network(blocks, device) for name in ("high", "low")}
    turns = Turns(experts, {name: expert.blocks for name, expert in experts.items()}, device)
    prepared = time.monotonic() - began
    moved = sum(weight.nbytes for weight in turns.host["high"].values())
    turns.bring("high")  # it takes the buffers

    seconds = []
    for number in range(RUNS):
        synchronise(device)
        began = time.monotonic()
        turns.bring(("low", "high")[number % 2])
        synchronise(device)
        seconds.append(time.monotonic() - began)
    same = all(torch.equal(weight.cpu(), turns.host["high"][key]) for key, weight in list(turns.shared.items())[:20])
    assert same, "the buffers do not hold the network that was brought last"
    median = statistics.median(seconds)
    return {
        "blocks": blocks, "bytes": moved, "seconds": seconds, "median": median, "GB/s": moved / median / 1e9,
        "preparing": prepared,
    }  # fmt: skip


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40, help="of each expert; the real ones have 40")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench/results/gpu/expert_swaps.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"model": MODEL, **measured(options.blocks, device)}
    studies.write(options.out, result, weights="random")
    print(f"{result['bytes'] / 2**30:.1f} GiB in {result['median']:.3f} s: {result['GB/s']:.1f} GB/s")


if __name__ == "__main__":
    main()
