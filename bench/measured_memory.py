"""The peak of a PRFL step on a GPU, and of each of its phases, beside what ``prfl train --dry-run`` predicts of the
same: random weights at real shapes.

    python bench/measured_memory.py --case '14B 480p' --out FILE.json        the cases of bench/predicted_memory.py

Two optimizer steps on a chain of four (the full chain keeps its forty), one video each; prediction and measurement are
of the same config, of the steps alone (the text encoder has its own phase, which is not measured).  The peaks are the
allocator's, after loading.  Exit 1 where that of the steps is more than a tenth from what is predicted; the phases' are
told beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench import studies
from bench.harness import worlds
from bench.harness.peaks import PEAK, measured_peaks, predicted_peaks
from bench.predicted_memory import CASES, SMALL
from prfl.config import load_config
from prfl.config.schema import Config
from prfl.factory.objective import build_reward_gradient
from prfl.training.optimizer import adamw, apply

TOLERANCE = 0.1
STEPS = 2


def config_of(name: str) -> Config:
    file, overrides, _ = CASES[name]
    chain = () if Path(file).stem == "full_chain" else ("rollout.steps=4",)
    single = "training.batch=1", "training.accumulation=1", "evaluation.every=0", "evaluation.final_samples=0"
    return load_config(file, ["backbone.device=cuda", *single, *chain, worlds.PROMPTS, *overrides])


def train(config: Config, world: str) -> dict[str, int]:
    """Take the steps as a run does; returns the bytes at their peak and at that of each phase, after the loading."""
    model = worlds.backbone(config)
    objective = build_reward_gradient(config, model, worlds.reward(world, config, model), None)
    model.park_vae()
    trained = objective.parameters()
    optimizer = adamw(list(trained.values()))
    torch.cuda.empty_cache()
    with measured_peaks() as peaks:
        for step in range(STEPS):
            optimizer.zero_grad()
            objective.accumulate(step, [step])
            apply(optimizer, 1e-5)
    return peaks


def measured(name: str) -> dict:
    config = config_of(name)
    predicted = predicted_peaks(config)
    peaks = train(config, "wan-1.3b" if CASES[name][0].startswith(SMALL) else "wan-14b")
    phases = {
        phase: {"predicted GB": size / 1e9, "measured GB": peaks[phase] / 1e9, "error": size / peaks[phase] - 1}
        for phase, size in predicted.items()
        if phase in peaks
    }
    return {"case": name, **phases.pop(PEAK), "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "what an allocator's peak is on a GPU is measured on one: none is here\n")
    result = measured(options.case)
    studies.write(options.out, {**result, "weights": "random"})
    for name, each in {result["case"]: result, **result["phases"]}.items():
        print(f"{name}: predicted {each['predicted GB']:.1f} GB, measured {each['measured GB']:.1f} GB")
    if abs(result["error"]) > TOLERANCE:
        parser.exit(1, f"the prediction is {result['error']:+.1%} off\n")


if __name__ == "__main__":
    main()
