"""What families share whose videos begin with a picture: it is read, fitted to the clip and encoded once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from prfl.backbone.condition import Ask, Condition
from prfl.backbone.pipeline import PipelineBackbone
from prfl.utils.errors import PrflError
from prfl.utils.pictures import read_first_frame
from prfl.utils.video_size import VideoSize

FRAME = "frame_latents"
"""Latents of the first frame: of it alone, or of a video that begins with it."""


@dataclass(frozen=True)
class FirstFrameTold:
    """What a network is told beside a picture: how much moves, and how much noise was added to the picture."""

    motion_bucket_id: float = 127.0
    noise_aug_strength: float = 0.02


@runtime_checkable
class TakesTold(Protocol):
    """A backbone whose network is told of its first frame."""

    def tell(self, told: FirstFrameTold) -> None: ...


def check_size(frame: Tensor, latents: Tensor, axes: int) -> None:
    """Raise PrflError for latents of another size than a first frame's, in so many of the last axes."""
    if frame.shape[-axes:] != latents.shape[-axes:]:
        sizes = [" x ".join(map(str, tensor.shape[-axes:])) for tensor in (frame, latents)]
        what = f"the first frame is of a video of {sizes[0]} latents, and these are {sizes[1]}"
        raise PrflError(what, where="data", fix="make the condition for the clip's own size")


class FirstFrameBackbone(PipelineBackbone):
    """A family says what a picture adds to a condition: ``frame_tensors``."""

    _last: tuple[Ask, dict[str, Tensor]] | None = None  # the first frame that was encoded last

    @abstractmethod
    def frame_tensors(self, picture: Tensor, clip: VideoSize) -> dict[str, Tensor]:
        """Encode a picture (3, H, W) of the clip's size: tensors of one sample, (1, ...)."""

    def encode_asks(self, asks: Sequence[Ask]) -> Condition:
        words, frames = super().encode_asks(asks), [self._of_frame(ask) for ask in asks]
        ours = {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
        return Condition({**words.tensors, **ours}, words.asks, words.ragged)

    @torch.no_grad()
    def _of_frame(self, ask: Ask) -> dict[str, Tensor]:
        """What an ask's first frame adds to its condition; asks for one frame after the other cost one encoding."""
        frame, clip = ask.unconditional, ask.clip
        if self._last is None or self._last[0] != frame:
            assert frame.image is not None and clip is not None, "check_asks"
            picture = read_first_frame(frame.image, clip.height, clip.width).to(self.facts.device)
            tensors = self.frame_tensors(picture, clip)
            self._last = frame, {name: each.to(self.facts.device, self.facts.dtype) for name, each in tensors.items()}
        return self._last[1]
