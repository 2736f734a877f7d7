"""How an objective reads a reward at latents: a latent reward as it is, a pixel reward through the decoder.

Beside its scores a scorer says what it can be used for (``noise_aware``, ``differentiable``) and which adapter must be
active while it is run and differentiated (``selected``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prfl.backbone import Backbone
from prfl.backbone.condition import Condition
from prfl.reward.aesthetic import AestheticReward
from prfl.reward.ensemble import RewardEnsemble
from prfl.reward.latent import LatentReward
from prfl.reward.pixel import PixelReward
from prfl.reward.scores import Scores, Shape, total
from prfl.utils import rng
from prfl.utils.errors import PrflError

Frames = Literal["all", "one"] | int


@runtime_checkable
class Scorer(Protocol):
    @property
    def noise_aware(self) -> bool: ...

    @property
    def differentiable(self) -> bool: ...

    def selected(self) -> AbstractContextManager: ...

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition, step: int) -> Scores: ...


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

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition, step: int) -> Scores:
        read = self.reward if self.aggregate == "sum" else self.reward.logits
        return read(latents, sigma, condition)


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

    reward: PixelReward | AestheticReward
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

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition, step: int) -> Scores:
        chosen = draw_frames(latents.shape[2], self.frames, self.seed, step)
        pixels, times = decode_frames(self.backbone, latents, chosen)
        return self.read(pixels, times, condition, chosen, latents.shape[2])

    def read(self, pixels: Tensor, times: Tensor, condition: Condition, chosen: Sequence[int], count: int) -> Scores:
        """The scores of decoded pixels (``decode_frames``) of the chosen ones of so many latent frames."""
        read: Callable[..., Scores] = self.reward if self.aggregate == "sum" else self.reward.logits
        if self.temporal_decay is None:
            return read(pixels, condition, times)
        # AestheticReward does this by itself, for a few frames at a time.
        if len(chosen) > 1 and not isinstance(self.reward, AestheticReward):
            read = partial(checkpoint, read, use_reentrant=False, preserve_rng_state=False)
        lengths = [1 if t == 0 else self.backbone.temporal_factor for t in chosen]
        weights = [math.exp(-self.temporal_decay * abs(t - (count - 1) / 2)) / len(chosen) for t in chosen]
        clips = zip(pixels.split(lengths, dim=2), times.split(lengths), weights, strict=True)
        parts = [(weight, read(some, condition, at)) for some, at, weight in clips]
        return {name: torch.stack([w * scores[name] for w, scores in parts]).sum(0) for name in parts[0][1]}


def draw_frames(count: int, frames: Frames, seed: int, step: int) -> list[int]:
    """Sorted indices of the latent frames that are decoded in this step: one of each of so many equal parts."""
    number = count if frames == "all" else 1 if frames == "one" else min(frames, count)
    bounds = [count * part // number for part in range(number + 1)]
    spans = zip(bounds[:-1], bounds[1:], strict=True)
    return [low + rng.integer(high - low, seed, "frames", step, part) for part, (low, high) in enumerate(spans)]


def decode_frames(backbone: Backbone, latents: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pixels (b, 3, f, H, W) of the chosen latent frames, and their times (f,) in [0, 1] of the whole clip.

    Latent frame 0 is one pixel frame, every other one ``temporal_factor`` of them.
    """
    count, factor = latents.shape[2], backbone.temporal_factor
    given = torch.zeros(count, 1, 1, dtype=torch.bool, device=latents.device)
    given[list(chosen)] = True
    mixed = torch.where(given, latents, latents.detach())[:, :, : chosen[-1] + 1]
    shown = [f for t in chosen for f in ([0] if t == 0 else range((t - 1) * factor + 1, t * factor + 1))]
    last = max(1, (count - 1) * factor)
    times = torch.tensor(shown, device=latents.device, dtype=torch.float32) / last
    return backbone.decode(mixed, gradient_from=chosen[0])[:, :, shown], times


@dataclass(frozen=True)
class RewardLoss:
    """What is minimised, per sample: ``linear`` -r, or ``hinge`` relu(target - r), times ``scale``.

    r is the weighted aggregate of the scores (``scores.total``).  The paper's own: scale 0.1, hinge at 2.
    """

    weights: dict[str, float]
    aggregate: Shape = "sum"
    shape: Literal["linear", "hinge"] = "hinge"
    target: float = 2.0
    scale: float = 0.1

    def __call__(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """(loss (b,), r (b,))."""
        reward = total(scores, self.weights, self.aggregate)
        missing = self.target - reward
        return self.scale * (missing.relu() if self.shape == "hinge" else -reward), reward


def reward_gradient(
    scorer: Scorer,
    loss: RewardLoss,
    latents: Tensor,
    sigma: Tensor,
    condition: Condition,
    step: int,
    *,
    at_once: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """d mean(loss) / d latents on a detached leaf, and metrics; nothing of the reward's graph is left behind.

    sigma: ().  at_once: samples whose graph lives at once, None is all; the mean is a sum over samples, so the gradient
    is the same.  Raises PrflError when no gradient gets from the reward to the latents.  One that is not finite is
    returned as it is: the trainer stops before the optimizer's step, and leaves the batch.
    """
    count = len(latents)
    gradients, losses, rewards, scored = [], [], [], []
    for first in range(0, count, at_once or count):
        some = slice(first, first + (at_once or count))
        leaf = latents[some].detach().requires_grad_()
        with scorer.selected(), torch.enable_grad():
            scores = scorer(leaf, sigma.expand(len(leaf)), condition[some], step)
            per_sample, reward = loss(scores)
            part = per_sample.sum() / count
            gradients.append(torch.autograd.grad(part, leaf, allow_unused=True)[0] if part.requires_grad else None)
        losses.append(part.detach())
        rewards.append(reward.detach())
        scored.append({name: values.detach() for name, values in scores.items()})
    reward = torch.cat(rewards)
    arrived = [gradient for gradient in gradients if gradient is not None]
    unmet = loss.shape == "linear" or bool((reward < loss.target).any())
    if len(arrived) < len(gradients) or (unmet and not any(bool(gradient.count_nonzero()) for gradient in arrived)):
        raise PrflError(
            "the reward gives no gradient to the latents",
            where="reward",
            fix="use a reward that is differentiable in its input, and check that it does not run under no_grad",
        )
    metrics = {"loss": float(torch.stack(losses).sum()), "reward": float(reward.mean())}
    metrics |= {f"reward/{name}": float(torch.cat([s[name] for s in scored]).mean()) for name in scored[0]}
    return torch.cat(arrived), metrics | {"reward_std": float(reward.std(correction=0))}
