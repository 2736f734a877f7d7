"""Golden scores of public rewards with their real weights: of two videos that a seed draws, beside the stored ones.

    python -m bench golden configs/wan2.1-1.3b/vader*.yaml            compare with bench/results/golden.json
    python -m bench golden configs/wan2.1-1.3b/vader*.yaml --write    store them, once, by whom has the weights

No video model is loaded.  A stored score is good to 1 % of itself, and one near zero to 0.001, or to 0.02 where the
weights are bfloat16, which differs by machine.  HPS tells videos apart by hundredths.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prfl.backbone.condition import Ask, Condition
from prfl.config import load_config
from prfl.factory.by_name import build_by_name
from prfl.factory.data import video_size
from prfl.factory.reward import PUBLIC_REWARDS
from prfl.utils.errors import PrflError
from prfl.utils.files import atomic_write

RESULTS = Path(__file__).parent / "results/golden.json"
PROMPTS = "a red circle moves to the left", "a dog runs on the beach at sunset"
SIZE = 17, 96, 160  # frames, height, width
TOLERANCE = 0.01  # of a score
NEAR_ZERO = {"float32": 0.001, "bfloat16": 0.02}


class Golden(NamedTuple):
    """The scores of the two videos, and how far each may be off where it is near zero."""

    values: list[float]
    near_zero: float

    def equals(self, stored: list[float]) -> bool:
        limits = [max(self.near_zero, TOLERANCE * abs(value)) for value in stored]
        return all(abs(a - b) <= limit for a, b, limit in zip(self.values, stored, limits, strict=True))


def videos() -> Tensor:
    """Two smooth videos (2, 3, frames, height, width), about [-1, 1]: the same on every machine."""
    coarse = torch.rand(2, 3, 5, 6, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, SIZE, mode="trilinear", align_corners=True)


@torch.no_grad()
def scores_of(config_file: Path, device: str) -> dict[str, Golden]:
    """Load the public rewards of a config and score the videos, by the names of their dimensions."""
    config = load_config(config_file)
    sections = config.reward.public if config.reward else []
    if not sections:
        raise PrflError("it follows no public reward", where=f"{config_file}: reward", fix="give a vader-*.yaml")
    pixels, condition = videos().to(device), Condition({}, tuple(Ask(prompt) for prompt in PROMPTS))
    scores: dict[str, Golden] = {}
    for section in sections:
        context = {"device": device, "data": config.data, "video": video_size(config.data)}
        reward = build_by_name(PUBLIC_REWARDS[type(section)].load, section, **context)
        near_zero = NEAR_ZERO[section.model_dump().get("dtype", "float32")]
        for name, values in reward(pixels, condition).items():
            scores[name] = Golden([round(float(each), 5) for each in values], near_zero)
    return scores


def golden(config_file: Path, device: str, write: bool, results: Path = RESULTS) -> list[str]:
    """Compare with the stored scores, or store them; returns a line for each dimension.

    Raises PrflError where one differs, or none is stored.
    """
    stored = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    scores = scores_of(config_file, device)
    if write:
        with atomic_write(results) as file:
            values = {name: each.values for name, each in scores.items()}
            file.write_text(json.dumps(dict(sorted((stored | values).items())), indent=1) + "\n", encoding="utf-8")
        return [f"{name}: {each.values} stored" for name, each in scores.items()]

    lines, wrong = [], []
    for name, each in scores.items():
        before = stored.get(name)
        if before is None:
            fix = "with weights that are known to be the published ones: --write"
            raise PrflError(f"no score of '{name}' is stored; here it is {each.values}", where=str(results), fix=fix)
        equal = each.equals(before)
        lines.append(f"{name}: {each.values}, stored {before}: {'equal' if equal else 'DIFFERENT'}")
        wrong += [] if equal else [name]
    if wrong:
        fix = "are these the published weights? If prfl/reward changed on purpose: --write"
        raise PrflError("; ".join(lines), where=str(config_file), fix=fix)
    return lines
