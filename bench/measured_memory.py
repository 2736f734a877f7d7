"""The peak of a PRFL step on a GPU beside what ``prfl train --dry-run`` predicts: random weights at real shapes.

    python bench/measured_memory.py --case '14B 480p' --out FILE.json        the cases of bench/predicted_memory.py

Two optimizer steps on a chain of four (the full chain keeps its forty), one video each; prediction and measurement are
of the same config.  The peak is the allocator's, after loading.  Exit 1 where they differ by more than a tenth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import studies
from bench.harness import worlds
from bench.predicted_memory import CASES, SMALL
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.estimate.memory import predict_memory
from prfl.factory.backbone import build_architecture
from prfl.factory.objective import build_reward_gradient
from prfl.training.optimizer import adamw, apply

TOLERANCE = 0.1
STEPS = 2


def config_of(name: str) -> Config:
    file, overrides, _ = CASES[name]
    chain = () if Path(file).stem == "full_chain" else ("rollout.steps=4",)
    one = "training.batch=1", "training.accumulation=1", "evaluation.every=0", "evaluation.final_samples=0"
    return load_config(file, ["backbone.device=cuda", *one, *chain, worlds.PROMPTS, *overrides])


def train(own: Config, world: str) -> None:
    """The steps, as a run takes them; the allocator's peak is counted from behind the loading."""
    model = worlds.backbone(own)
    objective = build_reward_gradient(own, model, worlds.reward(world, own, model), None)
    model.park_vae()
    trained = objective.parameters()
    optimizer = adamw(list(trained.values()))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS):
        optimizer.zero_grad()
        objective.accumulate(step, [step])
        apply(optimizer, 1e-5)


def measured(name: str) -> dict:
    own = config_of(name)
    predicted = predict_memory(own, build_architecture(own)).peak
    train(own, "wan-1.3b" if CASES[name][0].startswith(SMALL) else "wan-14b")
    peak = torch.cuda.max_memory_allocated()
    return {"case": name, "predicted GB": predicted / 1e9, "measured GB": peak / 1e9, "error": predicted / peak - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "what an allocator's peak is on a GPU is measured on one: none is here\n")
    found = measured(options.case)
    studies.write(options.out, {**found, "weights": "random"})
    print(f"{found['case']}: predicted {found['predicted GB']:.1f} GB, measured {found['measured GB']:.1f} GB")
    if abs(found["error"]) > TOLERANCE:
        parser.exit(1, f"the prediction is {found['error']:+.1%} off\n")


if __name__ == "__main__":
    main()
