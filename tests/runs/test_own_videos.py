"""From plain video files (mp4, webm, gif) and prompts to a reward head and a policy that follows it.

The files are encoded by the test and show nothing of the shapes world; its model is used because it is small, as the
plain diffusers folder that it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prfl import cli
from prfl.data.video import write_video
from prfl.toy.clips import model_folder
from tests.data.test_clips import texture
from tests.few_levels import measure_few

PROMPTS = {
    "train": ["waves on a lake", "clouds in the evening", "leaves in the wind"],
    "validation": ["smoke over a town", "sand in the desert"],
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blank_pictures: None) -> Path:
    """Three videos, one a format, at other sizes and rates than the clips; prompts; two configs and their story."""
    monkeypatch.chdir(tmp_path)
    measure_few(monkeypatch)
    write_video("videos/lake.mp4", texture(40, 32, 80, seed=1), 16)
    write_video("videos/more/sky.webm", texture(40, 32, 80, seed=2), 16)
    write_video("videos/more/tree.gif", texture(60, 80, 80, seed=3), 25)
    for split, prompts in PROMPTS.items():
        Path(f"{split}.txt").write_text("\n".join(prompts) + "\n")
    generator = {"name": "video_clips", "videos": "videos", "held_out": 0.34, "formats": ["mp4", "webm", "gif"]}
    common = {
        "version": 1,
        "seed": 0,
        "rollout": {"steps": 4},
        "data": {
            "generator": generator, "prompts": {split: f"{split}.txt" for split in PROMPTS}, "cache": "cache",
            "frames": 9, "height": 32, "width": 32, "fps": 16,
        },
    }  # fmt: skip
    model = {"model": str(model_folder())}
    head = {"dimensions": ["look", "motion"], "blocks": [2], "inner": 64}
    reward = {
        "run": "runs/reward",
        "backbone": model,
        "reward": {"space": "latent", "head": head},
        "objective": {"name": "preference", "loss": "bradley_terry"},
        "training": {"steps": 30, "batch": 16, "learning_rate": 6e-3},
        "evaluation": {"every": 0},
    }
    policy = {
        "run": "runs/prfl",
        "backbone": {**model, "adapter": {"rank": 2, "alpha": 2}},
        "reward": {"space": "latent", "path": "${stages.reward.run}/reward", "target": 8.0},
        "objective": {"name": "prfl", "sft": {"every": 1}},
        "training": {"steps": 3, "batch": 2, "learning_rate": 1e-3},
        "evaluation": {"every": 3, "prompts_per_round": 2},
    }
    for name, own in (("reward", reward), ("prfl", policy)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**common, **own}))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": ["reward.yaml", "prfl.yaml"]}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.pictures
def test_story_from_video_files_to_a_steered_policy(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache", "reward.yaml"]) == 0, capsys.readouterr().err
    (made,) = Path("cache").glob("video_clips-*")
    assert {path.suffix for path in (made / "videos").iterdir()} == {".mp4", ".webm", ".gif"}
    rows = [json.loads(line) for line in (made / "pairs.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "validation"} and len(rows) > 60
    assert cli.main(["train", "story.yaml"]) == 0, capsys.readouterr().err
    assert "0 videos encoded" in capsys.readouterr().out, "the policy's SFT clips are those of the pairs"

    assert cli.main(["eval", "reward.yaml"]) == 0, capsys.readouterr().err
    measured = json.loads(Path("runs/reward/reward_eval.json").read_text())["rows"]
    clean = {row["dimension"]: row["accuracy"]["value"] for row in measured if row["level"]["high"] == 0}
    noise = {row["dimension"]: row["accuracy"]["value"] for row in measured if row["level"]["low"] == 1}
    assert clean["look"] > 0.7 and clean["look"] > noise["look"], "held-out clips are told from their spoilt copies"

    steps = [json.loads(line) for line in Path("runs/prfl/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in steps if "gradient_norm" in record]
    assert len(steps) == 3 and all(record["gradient_norm"] > 0 and record["reward_std"] > 0 for record in steps)
    assert {"reward/look", "reward/motion"} <= steps[0].keys()
    assert Path("runs/prfl/policy.safetensors").is_file()
    assert list(Path("runs/prfl/samples").glob("step-*/videos/*.mp4"))
