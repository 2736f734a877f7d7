"""A small project to plant faults in: clips, prompts, configs and two saved rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from prfl.backbone import load_backbone
from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import write_video
from prfl.reward import LatentReward, RewardHead
from prfl.reward.checkpoint import RewardCard
from prfl.reward.pixel import PixelNetwork, PixelReward
from prfl.utils import rng
from tests.tiny import TEXT_WIDTH

CLIP = {"frames": 5, "height": 16, "width": 16, "fps": 8.0}
PROMPTS = {"train": ["a red circle", "a blue square"], "validation": ["a green circle"], "test": ["a red square"]}


def make_project(model: Path) -> None:
    for split, prompts in PROMPTS.items():
        Path(f"{split}.txt").write_text("\n".join(prompts) + "\n")
    rows = []
    for index in range(4):
        path = Path(f"clips/{index}.mp4")
        noise = rng.normal((3, 5, 16, 16), 0, "clip", 0, [index])[0]
        write_video(path, (0.3 * noise + (0.5 if index % 2 else -0.5)).clamp(-1, 1), 8)
        label = {"light": float(index % 2), "calm": float(index < 2)}
        rows.append(LabelledVideo(path, PROMPTS["train"][index // 2], label))
    write_manifest("manifest.jsonl", rows)
    clips = {"manifest": "manifest.jsonl"}
    common: dict[str, Any] = {"version": 1, "seed": 0, "rollout": {"steps": 4}, "evaluation": {"every": 0}}
    data = {"cache": "cache", **CLIP, "prompts": {split: f"{split}.txt" for split in PROMPTS}}
    training = {"steps": 2, "batch": 2, "learning_rate": 1e-3, "save_every": 1, "trackers": []}
    policy = {"model": str(model), "adapter": {"rank": 2, "alpha": 2}}
    head = {"dimensions": ["light", "calm"], "blocks": [1], "inner": 8, "hidden": 8}
    steer = {"weights": {"light": 1.0}, "shape": "linear"}
    configs: dict[str, dict[str, Any]] = {
        "sft": {"backbone": policy, "data": {**data, **clips}, "objective": {"name": "sft"}},
        "reward": {
            "backbone": {"model": str(model)},
            "data": {**data, **clips},
            "reward": {"space": "latent", "head": head},
            "objective": {"name": "preference", "loss": "bce"},
        },
        "prfl": {
            "backbone": policy,
            "data": data,
            "reward": {"space": "latent", "path": "heads/latent", **steer},
            "objective": {"name": "prfl"},
        },
        "vader": {
            "backbone": policy,
            "data": data,
            "reward": {"space": "pixel", "path": "heads/pixel", **steer},
            "objective": {"name": "vader"},
        },
    }
    for name, own in configs.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**common, "training": training, "run": f"runs/{name}", **own}))
    Path("story.yaml").write_text(yaml.safe_dump({"version": 1, "stages": ["reward.yaml", "prfl.yaml"]}))
    card = RewardCard(**{name: (value, value) for name, value in CLIP.items()})
    torch.manual_seed(0)
    latent = RewardHead(24, ["light", "calm"], inner=8, hidden=8)
    LatentReward(latent, load_backbone(model), [1], card=card).save_pretrained("heads/latent")
    PixelReward(PixelNetwork(TEXT_WIDTH, ["light", "calm"], hidden=8, inner=8), card=card).save_pretrained(
        "heads/pixel"
    )
