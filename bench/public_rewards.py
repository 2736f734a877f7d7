"""What one score with its gradient costs by each reward that others trained, beside the latent head's.

    python bench/public_rewards.py            counts; writes bench/results/public_rewards.json
    python bench/public_rewards.py --cpu      measures on this CPU; writes bench/results/public_rewards_cpu.json

Counted are whole networks in their published sizes, on ``meta`` tensors: nothing is downloaded, allocated or timed.  A
pixel reward reads decoded frames of 480 x 832, and its gradient is that at the pixels; the decoder is not in it.  The
latent head reads latents of the same video behind the first blocks of Wan 2.1 1.3B, as
configs/wan2.1-1.3b/reward.yaml has it.

Measured are the first layers of each, as the benchmark ``reward_on_cpu`` runs them, by the seconds that the processor
works for this process: on a machine that others use, a clock on the wall would measure them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import studies
from bench.cases.piece_cases import LATENT, config
from bench.cases.reward_cases import CPU_WORLD, KINDS, NOT_ON_CPU, new_head, reward_on_cpu, teraflops
from bench.harness import study_tables
from prfl.backbone.condition import Ask, Condition
from prfl.config.schema import Config
from prfl.config.sections.public_rewards import CriticConfig
from prfl.estimate.live_tensors import fused_on_meta
from prfl.estimate.memory import reward_tensors
from prfl.estimate.parts import Shapes
from prfl.estimate.phases import reward_phases
from prfl.estimate.units import GIB
from prfl.estimate.work import Counted
from prfl.factory.backbone import build_architecture
from prfl.factory.critic import untrained_critic
from prfl.reward.critic import CriticReward

RESULTS = Path("bench/results")
FRAMES = 9  # three latent frames of Wan's
ROUNDS = 3


def pixel_reward(make: Callable[[], Any], plain: Config) -> dict[str, Any]:
    """Count a reward on decoded frames."""
    condition = Condition({}, (Ask("a dog runs on the beach"),))
    with torch.device("meta"):
        reward = make()
        pixels = torch.rand(1, 3, FRAMES, plain.data.height, plain.data.width, requires_grad=True)
    with fused_on_meta("cuda"), Counted() as counted:
        total = torch.stack(list(reward(pixels, condition).values())).sum()
        saved = counted.live
        torch.autograd.grad(total, pixels)
    return {
        "weights GiB": sum(tensor.nbytes for tensor in reward_tensors(reward)) / GIB,
        "saved GiB": saved / GIB, "peak GiB": counted.peak / GIB, "TFLOP": teraflops(counted.work),
        "frames at once": reward.frames_at_once,
    }  # fmt: skip


def published_critic() -> CriticReward:
    """Build the critic that is the default of ``reward.critic``, with one question."""
    return untrained_critic(**CriticConfig().model_dump(exclude={"revision"}))


def latent_head(plain: Config) -> dict[str, Any]:
    """Count a new head; its weights are its own, the backbone's are there anyway."""
    model = build_architecture(plain)
    with torch.device("meta"):
        head = new_head(model).freeze()
    with fused_on_meta("cuda"):
        (part,) = reward_phases(plain, model, head, Shapes(model, plain), 1, held=0)
    weights = sum(tensor.nbytes for tensor in reward_tensors(head)) / GIB
    return {
        "weights GiB": weights, "saved GiB": part.saved / GIB, "peak GiB": part.bytes / GIB,
        "TFLOP": teraflops(part.work),
    }  # fmt: skip


def measured() -> dict[str, Any]:
    """Run the shortened networks, one after another; the first run of each is not timed."""
    problem, rows = reward_on_cpu(), {}
    for name, make in problem.works.items():
        work = make()
        work.run(None)
        seconds = [_processor_seconds(partial(work.run, None)) for _ in range(ROUNDS)]
        rows[name] = {**work.facts, "processor seconds": seconds}
        print(name, rows[name], flush=True)
        del work
        gc.collect()
    return rows


def _processor_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="measure the first layers of each on this CPU")
    if parser.parse_args().cpu:
        out = RESULTS / "public_rewards_cpu.json"
        result = {"threads": torch.get_num_threads(), "rows": measured(), "not run": NOT_ON_CPU}
        studies.write(out, result, weights="random")
        print(study_tables.of_files("public_rewards_cpu", out))
        return
    out = RESULTS / "public_rewards.json"
    plain = config(CPU_WORLD, f"data.frames={FRAMES}", "backbone.device=cuda")
    rows = {LATENT: latent_head(plain)} | {name: pixel_reward(make, plain) for name, make in KINDS.items()}
    rows["critic"] = pixel_reward(published_critic, plain)
    video = [FRAMES, plain.data.height, plain.data.width]
    studies.write(out, {"video": video, "rows": rows}, weights=studies.COUNTED)
    print(study_tables.of_files("public_rewards", out))


if __name__ == "__main__":
    main()
