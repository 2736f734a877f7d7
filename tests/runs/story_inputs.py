"""What the stories of other models are trained on, and whether a run went on where another had been."""

from __future__ import annotations

import json
from pathlib import Path

from prfl.data.manifest import LabelledVideo, write_manifest
from prfl.data.video import write_video
from prfl.utils import rng
from tests.wan_image import first_frames

PROMPTS = {"train": ["a red circle", "a blue square"], "validation": ["a green circle"], "test": ["a red square"]}


def write_inputs(frames: int, from_image: bool) -> None:
    """Write prompts and a manifest of labelled clips into the current folder: of each prompt a dark and a light one.

    frames: of a clip.  from_image: each prompt has a picture that its video begins with.
    """
    for split, prompts in PROMPTS.items():
        rows_of_prompts = [{"prompt": prompt} for prompt in prompts]
        if from_image:
            asks = first_frames(Path(f"pictures/{split}"), prompts)
            rows_of_prompts = [{"prompt": ask.prompt, "image": f"pictures/{split}/{ask.image.name}"} for ask in asks]
        Path(f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows_of_prompts))
    rows = []
    for split in ("train", "validation"):
        for prompt in PROMPTS[split]:
            for index in range(2):
                path = Path(f"clips/{split}-{prompt.replace(' ', '-')}-{index}.mp4")
                noise = rng.normal((3, frames, 16, 16), 0, prompt, 0, [index])[0]
                write_video(path, (0.3 * noise + (0.5 if index else -0.5)).clamp(-1, 1), 8)
                rows.append(LabelledVideo(path, prompt, {"light": float(index)}, split))
    write_manifest(Path("manifest.jsonl"), rows)


def assert_went_on(straight: str, resumed: str) -> None:
    """Assert that a copy of the run ``straight``, broken off after its first step, did not begin anew."""
    lines = Path(straight, "metrics.jsonl").read_text().splitlines()
    first = [line for line in lines if '"step": 1,' in line]
    assert first and first[0] in Path(resumed, "metrics.jsonl").read_text(), "it went on, and did not begin anew"
