"""What `prfl eval --benchmark` gives on the shapes world, whose videos and verdicts are made here.

    python -m bench.public_sets FOLDER       draws the videos into FOLDER, then prints the command

The model inside the package draws 8 videos of each of the 32 test prompts, the oracle judges them, and every two
videos of a prompt are a pair: a or b is better in a dimension, or it is a tie.  The result of the command on the reward
inside the package is in bench/results/public_sets.json.  It says that the command works, nothing of real videos.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import torch

from prfl.backbone import load_backbone
from prfl.data.manifest import Choice, LabelledVideo, PreferencePair, read_manifest, write_manifest
from prfl.rollout.sampling import SamplingSettings, decode_all, sample
from prfl.toy import clips as shapes
from prfl.toy import renderer

PROMPTS, PER_PROMPT = 32, 8  # all test prompts


def draw_videos(folder: Path, prompts: int, per_prompt: int) -> Path:
    """Draw and judge the videos; returns their manifest."""
    model = load_backbone(shapes.model_folder())
    size = shapes.CLIP
    settings = SamplingSettings(
        frames=size.frames, height=size.height, width=size.width, steps=20, shift=None, guidance_scale=1.0, batch=64,
        seed=1,
    )  # fmt: skip

    def drawn(captions: list[str], indices: list[int]) -> torch.Tensor:
        return decode_all(model, sample(model, captions, indices, settings), settings.batch)

    splits = {"test": renderer.split_prompts()["test"][:prompts]}
    return shapes.labelled(folder, splits, {"test": per_prompt}, drawn)


def compared(videos: list[LabelledVideo]) -> list[PreferencePair]:
    """Pair every two videos of a prompt, with a verdict on each dimension and on all of them (``Overall``)."""
    rows = []
    for a, b in combinations(videos, 2):
        if a.prompt == b.prompt:
            labels = [{**row.label, "Overall": sum(row.label.values())} for row in (a, b)]
            preference: dict[str, Choice] = {}
            for name in labels[0]:
                first, second = labels[0][name], labels[1][name]
                preference[name] = "tie" if first == second else "a" if first > second else "b"
            rows.append(PreferencePair(a.prompt, a.video, b.video, preference, a.split))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--per-prompt", type=int, default=PER_PROMPT)
    options = parser.parse_args()
    rows = read_manifest(draw_videos(options.folder, options.prompts, options.per_prompt))
    pairs = compared([row for row in rows if isinstance(row, LabelledVideo)])
    write_manifest(options.folder / "shapes-pairs.jsonl", pairs)
    path = options.folder / "shapes-pairs.jsonl"
    print(f"{len(pairs)} pairs: prfl eval --benchmark {path} --head shapes --model shapes")


if __name__ == "__main__":
    main()
