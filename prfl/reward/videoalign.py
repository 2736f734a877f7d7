"""VideoAlign: visual quality, motion quality and text alignment of a video, by a Qwen2-VL-2B (VideoReward).

About -3 to 3: each is normalised by the mean and deviation that its authors publish.  It reads two frames of a second,
evenly spaced from the first to the last: its score depends on the frames per second that the config says.
Source: arXiv 2501.13918, and its public code for the frames, the text and the head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.condition import Condition
from prfl.reward.look import evenly_spaced
from prfl.reward.qwen_score import Dtype, QwenScore, Reading, read_folder, untrained_parts
from prfl.reward.scores import Scores
from prfl.utils.errors import PrflError
from prfl.utils.video_size import VideoSize

FIX = "convert its checkpoint once: prfl convert videoalign --help"
DIMENSIONS, TOKENS = ("VQ", "MQ", "TA"), ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
PICTURES = "<|video_pad|>"
FEWEST_PIXELS = 128 * 28 * 28  # a smaller frame is made larger
FEWEST, MOST = 4, 768  # frames that its authors' code reads of a video
WORDS = 1000  # tokens of the text, about


class VideoAlign(QwenScore):
    """``reward(pixels, condition)`` gives {"VQ": (b,), "MQ": (b,), "TA": (b,)}; it reads the prompts.

    fps: of the videos.  frames: how many it reads, even; None is what its own frames per second give.
    """

    by_layer = True  # a whole video's activations are tens of gigabytes

    def __init__(self, *parts: Any, fps: float | int, frames: int | None = None) -> None:
        super().__init__(*parts)
        self.fps, self.frames = fps, frames

    def __call__(self, pixels: Float[Tensor, "b 3 f h w"], condition: Condition, times: Tensor | None = None) -> Scores:
        """Score videos.  times: not read; it is for whole videos."""
        count = self.count(pixels.shape[2])
        chosen = pixels[:, :, evenly_spaced(pixels.shape[2], count)]
        prompts = [ask.prompt for ask in condition.asks]
        scores = [self.score(video[None], prompt) for video, prompt in zip(chosen, prompts, strict=True)]
        return dict(zip(self.dimensions, torch.cat(scores).unbind(1), strict=True))

    def count(self, frames: int) -> int:
        """Return how many of so many frames it reads: an even number.  Raises PrflError for a single picture."""
        if frames < 2:
            fix = "decode more: objective.frames: all, and data.frames of a video"
            raise PrflError("VideoAlign reads videos, and this is one frame", where="reward.videoalign", fix=fix)
        most = min(MOST, frames // 2 * 2)
        if self.frames:
            return min(self.frames, most)
        assert self.reading.fps
        return min(round(max(frames / self.fps * self.reading.fps, FEWEST) / 2) * 2, most)


def load_videoalign(
    model: str | Path,
    frames: int | None = None,
    dtype: Dtype = "bfloat16",
    video: VideoSize | None = None,
    device: torch.device | str = "cpu",
) -> VideoAlign:
    """Load a converted VideoAlign from a folder.  video: its size, for the frames a second.  Raises PrflError."""
    parts = read_folder(str(model), dtype, FIX)
    if parts[-1].dimensions != DIMENSIONS or parts[-1].fps is None:
        raise PrflError("is another reward than VideoAlign", where=str(model), fix=FIX)
    return VideoAlign(*parts, fps=video.fps if video else 16.0, frames=frames).to(device)


def untrained(frames: int | None = None, dtype: Dtype = "bfloat16", video: VideoSize | None = None) -> VideoAlign:
    """Build one of the published size, whose bytes are counted on ``meta``."""
    text = " ".join(("{prompt}", PICTURES, *TOKENS))
    reading = Reading(text, PICTURES, TOKENS, DIMENSIONS, (0.0,) * 3, (1.0,) * 3, 200_704, FEWEST_PIXELS, fps=2.0)
    parts = untrained_parts(1536, 8960, 12, nn.Linear(1536, 1, bias=False), reading, WORDS, dtype)
    return VideoAlign(*parts, fps=video.fps if video else 16.0, frames=frames)
