"""HPSv3: people's choices of pictures of one prompt, by a Qwen2-VL-7B; the mean over a video's frames.

About 0 to 12.  The head gives a mean and a spread of the preference; the mean is the score.
Source: arXiv 2508.03789, and its public code for the size of pictures, the text and the head.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.reward.look import FRAMES_AT_ONCE
from prfl.reward.qwen_score import Dtype, QwenScore, Reading, read_folder, untrained_parts
from prfl.reward.scores import Scores
from prfl.utils.errors import PrflError

FIX = "convert its checkpoint once: prfl convert hpsv3 --help"
DIMENSIONS, TOKENS, PICTURES = ("hpsv3",), ("<|Reward|>",), "<|image_pad|>"
PIXELS = 256 * 28 * 28  # of every picture, about
WORDS = 400  # tokens of the text, about


class Hpsv3(QwenScore):
    """``reward(pixels, condition)`` gives {"hpsv3": (b,)}, differentiable in the pixels; it reads the prompts."""

    frames_at_once = FRAMES_AT_ONCE

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read."""
        scores = []
        for video, ask in zip(pixels, condition.asks, strict=True):
            pictures = video.transpose(0, 1)[:, :, None].split(FRAMES_AT_ONCE)  # each (n, 3, 1, h, w)
            scores.append(torch.cat([self.score(part, ask.prompt) for part in pictures]).mean(0))
        return {"hpsv3": torch.cat(scores)}


def load_hpsv3(model: str | Path, dtype: Dtype = "bfloat16", device: torch.device | str = "cpu") -> Hpsv3:
    """Load a converted HPSv3 from a folder.  Raises PrflError."""
    parts = read_folder(str(model), dtype, FIX)
    if parts[-1].dimensions != DIMENSIONS:
        raise PrflError("is another reward than HPSv3", where=str(model), fix=FIX)
    return Hpsv3(*parts).to(device)


def untrained(dtype: Dtype = "bfloat16") -> Hpsv3:
    """Build one of the published size, whose bytes are counted on ``meta``."""
    reading = Reading(
        " ".join(("{prompt}", PICTURES, *TOKENS)), PICTURES, TOKENS, DIMENSIONS, (0.0,), (1.0,), PIXELS, PIXELS
    )
    head = nn.Sequential(
        nn.Linear(3584, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    return Hpsv3(*untrained_parts(3584, 18_944, 28, head, reading, WORDS, dtype))
