"""The golden scores that a person with the real weights stores and compares: here with a tiny CLIP."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bench import golden
from prfl.utils.errors import PrflError
from tests.reward.tiny_rewards import save_tiny_clip

REPOSITORY = Path(__file__).parents[2]


def test_golden_scores_are_stored_and_compared(tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    config, results = tmp_path / "x.yaml", tmp_path / "golden.json"
    folder = REPOSITORY / "configs/wan2.1-1.3b"
    shutil.copy(folder / "prfl.yaml", tmp_path)
    text = (folder / "vader-clip.yaml").read_text()
    config.write_text(re.sub(r"  clip: .*", f"  clip: {{model: {clip}}}", text))
    with pytest.raises(PrflError, match="no score of 'clip' is stored"):
        golden.golden(config, "cpu", write=False, results=results)
    assert "stored" in golden.golden(config, "cpu", write=True, results=results)[0]
    assert golden.golden(config, "cpu", write=False, results=results)[0].endswith("equal")

    stored = json.loads(results.read_text())
    results.write_text(json.dumps({"clip": [stored["clip"][0] + 2, stored["clip"][1]]}))
    with pytest.raises(PrflError, match="DIFFERENT"):
        golden.golden(config, "cpu", write=False, results=results)
    with pytest.raises(PrflError, match="it follows no public reward"):
        golden.golden(folder / "prfl.yaml", "cpu", write=False, results=results)


@pytest.mark.parametrize(
    ("dtype", "values", "stored", "equal"),
    [
        ("float32", [0.27, 0.31], [0.2725, 0.31], True),
        ("float32", [0.27, 0.31], [0.27, 0.32], False),  # a hundredth is much for HPS
        ("float32", [0.0, 5.0], [0.002, 5.0], False),
        ("bfloat16", [0.0, 5.0], [0.015, 5.04], True),
        ("bfloat16", [0.0, 5.0], [0.0, 5.1], False),
    ],
)
def test_a_score_is_compared_by_what_its_weights_can_hold(
    dtype: str, values: list[float], stored: list[float], equal: bool
) -> None:
    assert golden.Golden(values, golden.NEAR_ZERO[dtype]).equals(stored) == equal
