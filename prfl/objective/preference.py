"""Training a latent reward from labels or preferences: the first stage, before a policy is trained by the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prfl.backbone.experts import highest_read
from prfl.data.dataset import LatentDataset, PairDataset
from prfl.data.examples import Drawn, Loss, draw_examples, examples
from prfl.objective.base import Mean
from prfl.reward import losses
from prfl.reward.latent import LatentReward
from prfl.reward.scores import Scores
from prfl.rollout.flow import add_noise, shift_sigmas
from prfl.utils import rng
from prfl.utils.schedule import unshifted
from prfl.utils.timing import Clock

SigmaSampling = Literal["uniform", "shifted", "mixture"]


def draw_sigma(
    sampling: SigmaSampling, shift: float, seed: int, step: int, indices: Sequence[int], highest: float = 1.0
) -> Float[Tensor, " b"]:
    """Return noise levels from 0 to ``highest``, (b,), float32.

    ``uniform`` draws them evenly, ``shifted`` as a sampler with this shift spreads its steps, and ``mixture`` draws
    each sample's level in one of the two ways, with equal chance.
    highest: the upper end, for a model that does not read all noise levels; the shape of the distribution is kept.
    """
    u = rng.uniform(seed, "preference/sigma", step, indices)
    shifted = shift_sigmas(u * unshifted(highest, shift), shift)
    u = u * highest
    if sampling == "mixture":
        even = rng.uniform(seed, "preference/sigma_kind", step, indices) < 0.5
        return torch.where(even, u, shifted).float().clamp(max=highest)
    return (shifted if sampling == "shifted" else u).float().clamp(max=highest)


def reward_loss(
    loss: Loss,
    logits: Scores,
    targets: dict[str, Tensor],
    sigma: Float[Tensor, " examples"],
    eta: float,
    labelled: dict[str, float],
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Return the loss, a mean over examples and dimensions, and metrics.

    logits: (examples,) for ``bce``; (2 examples,) for pairs, first all a, then all b.
    sigma: one noise level for both sides of a pair.
    labelled: for each dimension, the share of all examples that have a target.  The sum over a batch is divided by the
    number of targets expected from that share, not by the number that this batch happens to have.  So the loss is a
    sum over examples, and does not depend on how a batch is split.
    """
    terms, metrics = [], {}
    for name, logit in logits.items():
        target = targets[name].to(logit)
        if target.isnan().all():
            continue
        if loss == "bce":
            score, term = logit, losses.bce(logit, target)
        else:
            a, b = logit.chunk(2)
            score, term = a - b, pair_loss(loss, a, b, target, sigma, eta)

        terms.append(term * (float((~target.isnan()).double().mean()) / labelled[name]))

        decided = (target - 0.5).abs() > 0  # neither missing nor a tie
        if decided.any():
            right = ((score > 0) == (target > 0.5))[decided].double().mean()
            metrics[f"accuracy/{name}"] = Mean(float(right), int(decided.sum()))
    mean = torch.stack(terms).sum() / len(logits)
    return mean, {"loss": float(mean.detach()), **metrics}


def pair_loss(loss: Loss, a: Tensor, b: Tensor, target: Tensor, sigma: Tensor, eta: float) -> Float[Tensor, ""]:
    if loss == "rao_kupper":
        return losses.rao_kupper(a, b, target, eta)
    if loss == "thurstone":
        return losses.thurstone(a, b, target, sigma.to(a))
    return losses.bradley_terry(a, b, target)


@dataclass
class Preference:
    """Train a ``LatentReward`` on noised latents; both sides of a pair get the same sigma, noise and dropout.

    An index stands for one labelled video (``bce``) or one pair (other losses).  With a frozen backbone only the head
    has a graph.  A reward with an adapter of its own trains that adapter as well.
    sigma_sampling, shift: see ``draw_sigma``.  eta: the parameter of the loss ``rao_kupper``.
    """

    reward: LatentReward
    dataset: LatentDataset | PairDataset
    seed: int
    loss: Loss = "bce"
    sigma_sampling: SigmaSampling = "uniform"
    shift: float = 1.0
    eta: float = 5.0

    def __post_init__(self) -> None:
        self.examples = examples(self.dataset, self.loss, self.reward.dimensions)
        self.highest = highest_read(self.reward.backbone.facts)

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.reward.parameters()

    def draw(self, step: int, indices: Sequence[int]) -> tuple[Drawn, Tensor, Tensor]:
        """Return the batch, sigma (b,) and noise (b, c, t, h, w); for pairs both sides share them."""
        batch = draw_examples(self.dataset, self.examples, self.seed, indices)
        sigma = draw_sigma(self.sigma_sampling, self.shift, self.seed, step, indices, self.highest)
        noise = rng.normal(batch.latents.shape[1:], self.seed, "preference/noise", step, indices)
        return batch, sigma.to(batch.latents), noise.to(batch.latents)

    def accumulate(self, step: int, indices: Sequence[int]) -> dict[str, float]:
        """See ``Objective``."""
        clock = Clock(self.reward.backbone.facts.device)
        with clock("data"):
            batch, sigma, noise = self.draw(step, indices)
        each = sigma.repeat(batch.sides)
        noisy = add_noise(batch.latents, noise.repeat(batch.sides, 1, 1, 1, 1), each)
        dropout = rng.seeds(self.seed, "dropout/preference", step, indices).to(sigma.device).repeat(batch.sides)
        with self.reward.selected(dropout):  # spans the backward pass too, in which checkpointing recomputes blocks
            with clock("reward"):
                logits = self.reward.logits(noisy, each, batch.condition)
                labelled = self.examples.labelled
                loss, metrics = reward_loss(self.loss, logits, batch.targets, sigma, self.eta, labelled)
            with clock("backward"):
                loss.backward()
        return metrics | clock.metrics()

    def describe(self, step: int, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the batch as it was drawn, for a person who wants to know why it failed."""
        batch, sigma, noise = self.draw(step, indices)
        tensors = {"latents": batch.latents, "sigma": sigma, "noise": noise}
        return tensors | {f"target/{name}": t for name, t in batch.targets.items()}, {"prompts": batch.prompts}
