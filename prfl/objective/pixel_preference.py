"""Training a pixel reward from labels or preferences, on decoded clean latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone import Backbone
from prfl.data.dataset import LatentDataset, PairDataset
from prfl.data.examples import Drawn, Loss, draw_examples, examples
from prfl.objective.preference import reward_loss
from prfl.reward.pixel import PixelReward
from prfl.utils import rng
from prfl.utils.timing import Clock


@dataclass
class PixelPreference:
    """Train a ``PixelReward`` on decoded clean latents.  Pixels are not clamped, as later with the policy's videos.

    frames: how many frames of each clip the reward sees, a new random subset each step; None is all.
    eta: the parameter of the loss ``rao_kupper``.
    keep_decoded: keep every decoded clip in host memory as float16, so that each is decoded only once.
    """

    reward: PixelReward
    dataset: LatentDataset | PairDataset
    backbone: Backbone
    seed: int
    loss: Loss = "bce"
    frames: int | None = None
    eta: float = 5.0
    keep_decoded: bool = False
    decoded: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.examples = examples(self.dataset, self.loss, self.reward.dimensions)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.reward.parameters()

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """See ``Objective``.  The subset of frames depends on the step only, and is the same for all samples."""
        clock = Clock(self.backbone.facts.device)
        with clock("data"):
            batch = draw_examples(self.dataset, self.examples, self.seed, indices)
            pixels = self.pixels(batch)

        # Draw the frames that the reward sees, in ascending order.
        count = pixels.shape[2]
        shown = torch.arange(count)
        if self.frames is not None and self.frames < count:
            order = torch.randperm(count, generator=rng.generator(self.seed, "preference/frames", step))
            shown = order[: self.frames].sort().values

        with clock("reward"):
            times = shown / max(count - 1, 1)
            logits = self.reward.logits(pixels[:, :, shown.to(pixels.device)], batch.condition, times)
            sigma = torch.zeros(len(indices), device=pixels.device)
            loss, metrics = reward_loss(self.loss, logits, batch.targets, sigma, self.eta, self.examples.labelled)
        with clock("backward"):
            loss.backward()
        return metrics | clock.metrics()

    @torch.no_grad()
    def pixels(self, batch: Drawn) -> Float[Tensor, "n 3 f H W"]:
        """Return the decoded clips.  All are rounded to float16, kept or not, so that keeping them changes nothing."""
        fresh = {row: at for at, row in enumerate(batch.rows) if row not in self.decoded}
        clips = {row: self.decoded[row] for row in batch.rows if row not in fresh}
        if fresh:
            decoded = self.backbone.decode(batch.latents[list(fresh.values())]).half().cpu()
            clips |= dict(zip(fresh, decoded, strict=True))
        if self.keep_decoded:
            self.decoded |= clips
        return torch.stack([clips[row] for row in batch.rows]).to(batch.latents)

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the batch as it was drawn, for a person who wants to know why it failed."""
        batch = draw_examples(self.dataset, self.examples, self.seed, indices)
        tensors = {"latents": batch.latents} | {f"target/{name}": t for name, t in batch.targets.items()}
        return tensors, {"prompts": batch.prompts}
