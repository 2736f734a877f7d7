"""How a reward is read at latents: a latent reward as it is, a pixel reward through the decoder.

Beside its scores a scorer says what it can be used for (``noise_aware``, ``differentiable``) and which adapter must be
active while it is run and differentiated (``selected``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prfl.backbone import Backbone
from prfl.backbone.condition import Condition
from prfl.backbone.flow_form import ended
from prfl.backbone.frames import pixel_counts
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.frames import Frames, decode_frames, draw_frames
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.reward.public import PublicReward
from prfl.reward.scores import Scores, Shape


@runtime_checkable
class Scorer(Protocol):
    @property
    def noise_aware(self) -> bool: ...

    @property
    def differentiable(self) -> bool: ...

    def selected(self) -> AbstractContextManager: ...

    def __call__(
        self, latents: Float[Tensor, "b c t h w"], sigma: Tensor, condition: Condition, step: int
    ) -> Scores: ...


@dataclass(frozen=True)
class LatentScorer:
    """A latent reward, or several, at (latents, sigma): normalised scores, or logits for ``logsigmoid``."""

    reward: LatentReward | RewardEnsemble
    aggregate: Shape = "sum"

    @property
    def noise_aware(self) -> bool:
        return self.reward.noise_aware

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def selected(self) -> AbstractContextManager:
        return self.reward.selected()

    def __call__(self, latents: Float[Tensor, "b c t h w"], sigma: Tensor, condition: Condition, step: int) -> Scores:
        read = self.reward if self.aggregate == "sum" else self.reward.logits
        return read(latents, sigma, condition)


@dataclass(frozen=True)
class JointScorer:
    """A latent reward and one on decoded pixels at the same clean latents: the scores of both."""

    latent: LatentScorer
    pixel: PixelScorer

    @property
    def noise_aware(self) -> bool:
        return False

    @property
    def differentiable(self) -> bool:
        return self.latent.differentiable and self.pixel.differentiable

    def selected(self) -> AbstractContextManager:
        return self.latent.selected()  # the decoder has no adapter

    def __call__(self, latents: Float[Tensor, "b c t h w"], sigma: Tensor, condition: Condition, step: int) -> Scores:
        scores = self.latent(latents, sigma, condition, step)
        return scores | self.pixel(latents, sigma, condition, step)


@dataclass(frozen=True)
class PixelScorer:
    """A pixel reward on decoded latents (clean ones, or a clean prediction), around the decoder's clamp.

    frames: ``all``, ``one`` latent frame or a number of them (``draw_frames``), drawn anew each step.  Latent frames
    behind the last that was drawn are not decoded; those before are, because the decoder is causal.  Only the drawn
    ones receive gradient, and activations are kept from the first to the last of them.
    temporal_decay: None scores all of them together; else each latent frame t of T is scored by itself, and the score
    is the mean over the drawn ones of exp(-decay |t - (T - 1) / 2|) times theirs (InstructVideo).

    Frames that are scored by themselves are differentiated by themselves too: each is read without a graph, and read
    again in the backward pass, where its gradient is added at the pixels and its activations are freed before the next
    one's; then comes the decoder's one backward pass.  Nothing else in here comes apart: ``PixelReward`` mixes frames,
    and its dimensions, like a latent head's, are the last layer of one trunk, whose activations each of them needs.
    """

    reward: PixelReward | PublicReward
    backbone: Backbone
    seed: int
    frames: Frames = "all"
    aggregate: Shape = "sum"
    temporal_decay: float | None = None

    @property
    def noise_aware(self) -> bool:
        return self.reward.noise_aware

    @property
    def differentiable(self) -> bool:
        return self.reward.differentiable

    def selected(self) -> AbstractContextManager:
        return self.backbone.adapter(None)

    def __call__(self, latents: Float[Tensor, "b c t h w"], sigma: Tensor, condition: Condition, step: int) -> Scores:
        chosen = draw_frames(latents.shape[2], self.frames, self.seed, step)
        pixels, times = decode_frames(self.backbone, ended(self.backbone.facts, latents, sigma), chosen)
        return self.read(pixels, times, condition, chosen, latents.shape[2])

    def read(self, pixels: Tensor, times: Tensor, condition: Condition, chosen: Sequence[int], count: int) -> Scores:
        """Return the scores of decoded pixels (``decode_frames``) of the chosen ones of so many latent frames."""
        read: Callable[..., Scores] = self.reward if self.aggregate == "sum" else self.reward.logits
        if self.temporal_decay is None:
            return read(pixels, condition, times)
        if len(chosen) > 1 and self.reward.frames_at_once is None:  # else it does this by itself
            read = partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)
        lengths = pixel_counts(chosen, self.backbone.facts.temporal_factor)
        weights = [math.exp(-self.temporal_decay * abs(t - (count - 1) / 2)) / len(chosen) for t in chosen]
        clips = zip(pixels.split(lengths, dim=2), times.split(lengths), weights, strict=True)
        parts = [(weight, read(clip, condition, at)) for clip, at, weight in clips]
        return {name: torch.stack([w * scores[name] for w, scores in parts]).sum(0) for name in parts[0][1]}
